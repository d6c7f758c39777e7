"""Programs that use a language model as a part: optimisation by prompting, plans and replies that
are verified from outside, reading of what exceeds the context.

    models            ChatModel, the protocol; budgets
    endpoint          OpenAI-compatible endpoints
    recorder          a record of every call, by which runs are resumed and audited
    scripted          replies written by a function, for tests

`mmllm.Chat` is a ChatModel. Nothing here imports torch.
"""

from mmllm.reasoning.endpoint import OpenAIModel
from mmllm.reasoning.models import (
    Budget,
    BudgetError,
    CallError,
    CallUsage,
    ChatModel,
    Completion,
)
from mmllm.reasoning.recorder import Recorder
from mmllm.reasoning.scripted import ScriptedModel

__all__ = [
    "Budget",
    "BudgetError",
    "CallError",
    "CallUsage",
    "ChatModel",
    "Completion",
    "OpenAIModel",
    "Recorder",
    "ScriptedModel",
]
