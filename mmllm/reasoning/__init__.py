"""Programs that use a language model as a part: optimisation by prompting, plans and replies that
are verified from outside, reading of what exceeds the context.

    models               ChatModel, the protocol; budgets
    endpoint             OpenAI-compatible endpoints
    recorder             a record of every call, by which runs are resumed and audited
    scripted             replies written by a function, for tests
    search_loop          prompt from history -> completions -> candidates -> evaluation -> history
    problems             what is searched for, with sound evaluations
    baselines, report    random search and hill climbing at equal evaluations; the report

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
from mmllm.reasoning.search_loop import Evaluation, Problem, SearchResult, search

__all__ = [
    "Budget",
    "BudgetError",
    "CallError",
    "CallUsage",
    "ChatModel",
    "Completion",
    "Evaluation",
    "OpenAIModel",
    "Problem",
    "Recorder",
    "ScriptedModel",
    "SearchResult",
    "search",
]
