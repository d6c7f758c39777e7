"""Programs that use a language model as a part: optimisation by prompting, plans and replies that
are verified from outside, reading of what exceeds the context.

    models               ChatModel, the protocol; budgets
    endpoint             OpenAI-compatible endpoints
    recorder             a record of every call, by which runs are resumed and audited
    scripted             replies written by a function, for tests
    search_loop          prompt from history -> completions -> candidates -> evaluation -> history
    problems             what is searched for, with sound evaluations
    baselines, report    random search and hill climbing at equal evaluations; the report
    verified             replies that are made again until a check accepts them
    sources, tree, walk, reading  MemWalker: texts, clips and sounds that exceed the context
    wording              which wording of a request serves a model best
    system2_attention    conversations without what should not count

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
from mmllm.reasoning.sources import LongMedium
from mmllm.reasoning.system2_attention import focus
from mmllm.reasoning.tree import SummaryTree, TreeOptions, build_tree
from mmllm.reasoning.verified import ReplyVerdict, Verification
from mmllm.reasoning.walk import walk
from mmllm.reasoning.wording import best_wording, grammar

__all__ = [
    "Budget",
    "BudgetError",
    "CallError",
    "CallUsage",
    "ChatModel",
    "Completion",
    "Evaluation",
    "LongMedium",
    "OpenAIModel",
    "Problem",
    "Recorder",
    "ReplyVerdict",
    "ScriptedModel",
    "SearchResult",
    "SummaryTree",
    "TreeOptions",
    "Verification",
    "best_wording",
    "build_tree",
    "focus",
    "grammar",
    "search",
    "walk",
]
