"""The model of the examples: a real one where the environment has a key, else one that says a script."""

from __future__ import annotations

import os
from collections.abc import Sequence

from langchain.chat_models import init_chat_model
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage

from sandbox_tools.testing import ScriptedModel

MODELS = {
    "ANTHROPIC_API_KEY": "anthropic:claude-sonnet-4-5",
    "OPENAI_API_KEY": "openai:gpt-5",
    "GOOGLE_API_KEY": "google_genai:gemini-2.5-pro",
}


def choose_model(script: Sequence[AIMessage | str]) -> BaseChatModel:
    """The first model that there is a key for, else one that says the script."""
    chosen = next((model for key, model in MODELS.items() if os.environ.get(key)), None)
    return init_chat_model(chosen) if chosen else ScriptedModel(script=list(script))
