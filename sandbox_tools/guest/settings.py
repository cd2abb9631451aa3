"""What the engine told this sandbox through `POST /init`; `envd` writes it, the interpreter and commands read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sandbox_tools.guest.outside import VARIABLES

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(kw_only=True)
class Settings:
    """One per guest, shared by its services."""

    env_vars: Mapping[str, str] = field(default_factory=dict)
    """The environment variables of the whole sandbox."""
    access_token: str | None = None
    """What callers must send as `X-Access-Token`. None: nothing is asked for."""
    lifecycle_id: str | None = None
    """Which sandbox this memory belongs to. None: none yet, it is the image that others are restored from."""
    let_out: bool = False
    """Whether programs are told of the way out; the engine guards it whatever they are told."""
    births: int = 0
    """How often this memory became another sandbox."""

    def init(
        self,
        *,
        env_vars: Mapping[str, str] | None = None,
        access_token: str | None = None,
        lifecycle_id: str | None = None,
        let_out: bool | None = None,
    ) -> None:
        """Takes over what is given; None leaves a value as it is.

        The first call, and each one that brings another `lifecycle_id`, is a birth: kernels that came with the image
        then get random numbers of their own. A resume repeats the id, so that a seeded generator goes on undisturbed.
        """
        if env_vars is not None:
            self.env_vars = dict(env_vars)
        if access_token is not None:
            self.access_token = access_token
        if let_out is not None:
            self.let_out = let_out

        if self.births == 0 or (lifecycle_id is not None and lifecycle_id != self.lifecycle_id):
            self.births += 1
        self.lifecycle_id = lifecycle_id or self.lifecycle_id

    @property
    def environment(self) -> Mapping[str, str]:
        """The environment variables of the whole sandbox, and what tells programs of the way out."""
        return {**VARIABLES, **self.env_vars} if self.let_out else self.env_vars
