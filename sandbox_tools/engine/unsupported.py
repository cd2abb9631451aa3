"""What the clouds have and this engine has not: each is answered with a 403 that says why."""

from __future__ import annotations

from sandbox_tools.engine.operations import Answer, Call, Method, Operation
from sandbox_tools.errors import AccessDeniedError

_EGRESS = "What a sandbox may reach is said once. Give `allow_internet_access` and `network` when you create it."
_VOLUMES = "Volumes live in the cloud. Write files into the sandbox, or keep them in a snapshot."
_SECRETS = "Secrets live in the cloud. Pass `envVars` when you create the sandbox."
_BUILDS = (
    "Build templates with `sandbox-tools template build` on the engine's machine, or set a sandbox up, take a snapshot "
    "of it and create from that."
)
_QUOTA = "There are no accounts here, and so no quotas."
_EVENTS = "There are no events here. Each sandbox's logs say what happened to it."
_MACHINE = "The machine of a sandbox is given by its template. Start the engine with more memory."


def refuse(what: str, why: str) -> AccessDeniedError:
    """The error for whoever asks for it."""
    msg = f"{what} can't be had from the local engine. {why}"
    return AccessDeniedError(msg, error_code="not_supported_by_local_engine")


def _refused(name: str, method: Method, path: str, what: str, why: str) -> Operation:
    async def handler(call: Call) -> Answer:
        if "sandboxID" in call.path:
            call.supervisor.entry(call.sandbox_id)
        raise refuse(what, why)

    errors = (403, 404) if "{sandboxID}" in path else (403,)
    return Operation(
        name=name, method=method, path=path, summary=f"Not here: {what}", handler=handler, answers={}, errors=errors
    )


OPERATIONS: tuple[Operation, ...] = (
    _refused("quota", "GET", "/sandboxes/quota", "A quota", _QUOTA),
    _refused("events", "GET", "/sandboxes/events", "Events", _EVENTS),
    _refused("setNetwork", "PUT", "/sandboxes/{sandboxID}/network", "A change of the network", _EGRESS),
    _refused("hotplugMemory", "POST", "/sandboxes/{sandboxID}/hotplug-memory", "More memory", _MACHINE),
    _refused("mountVolume", "POST", "/sandboxes/{sandboxID}/volume-mounts", "A volume", _VOLUMES),
    _refused("unmountVolume", "DELETE", "/sandboxes/{sandboxID}/volume-mounts", "A volume", _VOLUMES),
    _refused("commit", "POST", "/sandboxes/{sandboxID}/commit", "A template from a sandbox", _BUILDS),
    _refused("listVolumes", "GET", "/volumes", "A volume", _VOLUMES),
    _refused("createVolume", "POST", "/volumes", "A volume", _VOLUMES),
    _refused("volume", "GET", "/volumes/{volumeID}", "A volume", _VOLUMES),
    _refused("deleteVolume", "DELETE", "/volumes/{volumeID}", "A volume", _VOLUMES),
    _refused("listSecrets", "GET", "/secrets", "A secret", _SECRETS),
    _refused("createSecret", "POST", "/secrets", "A secret", _SECRETS),
    _refused("secret", "GET", "/secrets/{secretID}", "A secret", _SECRETS),
    _refused("updateSecret", "POST", "/secrets/{secretID}", "A secret", _SECRETS),
    _refused("deleteSecret", "DELETE", "/secrets/{secretID}", "A secret", _SECRETS),
    _refused("listTemplates", "GET", "/templates", "A list of templates", _BUILDS),
    _refused("buildTemplate", "POST", "/templates", "A template build", _BUILDS),
    _refused("listTemplatesV2", "GET", "/v2/templates", "A list of templates", _BUILDS),
    _refused("buildTemplateV2", "POST", "/v2/templates", "A template build", _BUILDS),
    _refused("buildTemplateV3", "POST", "/v3/templates", "A template build", _BUILDS),
    _refused("startBuild", "POST", "/v2/templates/{templateID}/builds/{buildID}", "A template build", _BUILDS),
)
