"""Blocksworld with four operators (Gupta and Nau 1992), and a sound verifier of plans.

A state maps each block to what it stands on: another block or the table. One hand holds at most one
block. A plan is valid if every action can be executed and the goal holds at the end; nothing else
counts as a solution.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmllm.errors import ConfigError
from mmllm.reasoning.search_loop import Evaluation

TABLE = "table"
_NAMES = "ABCDEFGHIJ"
_BLOCK = r"(?:the\s+)?(?:block\s+)?([A-J])\b"
_ACTION = re.compile(
    rf"\b(?:(pick)[- ]?up\s+{_BLOCK}|(put)[- ]?down\s+{_BLOCK}"
    rf"|(unstack)\s+{_BLOCK}\s+(?:from\s+)?(?:on\s+top\s+of\s+)?{_BLOCK}"
    rf"|(stack)\s+{_BLOCK}\s+(?:on\s*to\s+|on\s+top\s+of\s+|on\s+)?{_BLOCK})",
    re.IGNORECASE,
)
_MAX_ACTIONS = 200

State = Mapping[str, str]
"""Block -> block or TABLE that it stands on; a block that is held is missing."""


@dataclass(frozen=True)
class Action:
    """pick-up BLOCK, put-down BLOCK, stack BLOCK on OTHER, unstack BLOCK from OTHER."""

    name: str
    block: str
    other: str = TABLE

    def __str__(self) -> str:
        joint = {"stack": f" on {self.other}", "unstack": f" from {self.other}"}
        return f"{self.name} {self.block}{joint.get(self.name, '')}"


Plan = tuple[Action, ...]


class ActionError(ValueError):
    """An action that cannot be executed, and why."""


def execute(state: State, held: str | None, action: Action) -> tuple[dict[str, str], str | None]:
    """Execute an action.

    Args:
        state: the state.
        held: the block in the hand, if any.
        action: the action.

    Returns:
        The state and the held block after it.

    Raises:
        ActionError: a precondition does not hold; the message says which.
    """
    blocks = {*state, *([held] if held else [])}
    if action.block not in blocks or action.other not in {*blocks, TABLE}:
        unknown = action.block if action.block not in blocks else action.other
        raise ActionError(f"there is no block {unknown}")
    after = dict(state)
    if action.name in ("pick-up", "unstack"):
        if held:
            raise ActionError(f"the hand already holds {held}")
        if action.block in state.values():
            raise ActionError(f"{action.block} is not clear: another block stands on it")
        if state[action.block] != action.other:
            raise ActionError(f"{action.block} stands on {state[action.block]}, not {action.other}")
        del after[action.block]
        return after, action.block
    if held != action.block:
        raise ActionError(f"the hand does not hold {action.block}")
    if action.name == "stack":
        if action.other in (TABLE, action.block):
            raise ActionError(f"{action.block} cannot be stacked on {action.other}")
        if action.other in state.values():
            raise ActionError(f"{action.other} is not clear: another block stands on it")
    after[action.block] = action.other
    return after, None


def executable(state: State, held: str | None) -> list[Action]:
    """All actions that can be executed.

    Args:
        state: the state.
        held: the block in the hand, if any.
    """
    if held:
        clear = [block for block in state if block not in state.values()]
        return [Action("put-down", held), *(Action("stack", held, block) for block in clear)]
    return [
        Action("pick-up", block) if below == TABLE else Action("unstack", block, below)
        for block, below in state.items()
        if block not in state.values()
    ]


class Blocksworld:
    """One instance: an initial state and a goal; solved by a valid plan.

    Args:
        num_blocks: from 3 to 10.
        seed: of both states; they differ.
    """

    rules = (
        "I am playing with a set of blocks. These are the actions I can do:\n"
        "pick-up A: take block A from the table\n"
        "put-down A: put block A, which I hold, on the table\n"
        "stack A on B: put block A, which I hold, on block B\n"
        "unstack A from B: take block A from block B\n"
        "I can hold one block at a time. I can only take a block, or put one on it, if it is clear:"
        " no block is on top of it."
    )
    instruction = (
        "Give a plan that reaches the goal. Write one action per line, between [PLAN] and [END]."
    )

    def __init__(self, num_blocks: int = 4, *, seed: int = 0):
        if not 3 <= num_blocks <= len(_NAMES):
            raise ConfigError(f"blocksworld: expected 3 to {len(_NAMES)} blocks, got {num_blocks}")
        rng = random.Random(seed)
        self.initial = _random_state(num_blocks, rng)
        self.goal = self.initial
        while self.goal == self.initial:
            self.goal = _random_state(num_blocks, rng)
        self.name = f"blocksworld, {num_blocks} blocks"
        self.introduction = (
            f"{self.rules}\n\nAs initial conditions I have that {_describe(self.initial)}, and the "
            f"hand is empty. My goal is to have that {_describe(self.goal)}."
        )

    def start(self, rng: random.Random) -> list[Plan]:
        """None."""
        return []

    def parse(self, text: str) -> Plan:
        """The actions after the last [PLAN], up to [END]."""
        text = text.rpartition("[PLAN]")[2].partition("[END]")[0]
        actions = []
        for match in _ACTION.finditer(text):
            name, block, *other = [group for group in match.groups() if group]
            names = {"pick": "pick-up", "put": "put-down"}
            name = names.get(name.lower(), name.lower())
            actions.append(Action(name, block.upper(), other[0].upper() if other else TABLE))
        if not actions:
            raise ValueError("there is no action in it, such as `pick-up A` or `stack A on B`")
        if len(actions) > _MAX_ACTIONS:
            raise ValueError(f"the plan has more than {_MAX_ACTIONS} actions")
        return tuple(actions)

    def show(self, candidate: Plan) -> str:
        return "\n".join(["[PLAN]", *map(str, candidate), "[END]"])

    def show_evaluated(self, candidate: Plan, value: float) -> str:
        return f"{self.show(candidate)}\ngoals missed:\n{value:g}"

    def evaluate(self, candidate: Plan) -> Evaluation:
        """The number of goals that do not hold where the plan ends or its first action fails; half
        a goal more for one that fails."""
        state: State = self.initial
        held: str | None = None
        for number, action in enumerate(candidate, start=1):
            try:
                state, held = execute(state, held, action)
            except ActionError as error:
                missed = len(self._missed(state))
                critique = f"action {number}, `{action}`, cannot be executed: {error}"
                return Evaluation(missed + 0.5, False, critique)
        missed = self._missed(state)
        if not missed:
            return Evaluation(0, True)
        wrong = ", ".join(f"{block} is not on {_place(self.goal[block])}" for block in missed)
        return Evaluation(len(missed), False, f"at the end of the plan {wrong}")

    def random(self, rng: random.Random) -> Plan:
        """A random executable plan of 1 to 4 actions per block."""
        return self._walk((), rng.randint(1, 4 * len(self.initial)), rng)

    def neighbor(self, candidate: Plan, rng: random.Random) -> Plan:
        """The plan up to a random place, and from there a random executable plan."""
        kept = candidate[: rng.randint(0, len(candidate))]
        return self._walk(kept, rng.randint(1, 2 * len(self.initial)), rng)

    def _walk(self, plan: Sequence[Action], num: int, rng: random.Random) -> Plan:
        """The executable beginning of a plan, and `num` random executable actions."""
        state: State = self.initial
        held: str | None = None
        done: list[Action] = []
        for action in plan:
            try:
                state, held = execute(state, held, action)
            except ActionError:
                break
            done.append(action)
        for _ in range(num):
            action = rng.choice(executable(state, held))
            state, held = execute(state, held, action)
            done.append(action)
            if not self._missed(state):
                break
        return tuple(done)

    def _missed(self, state: State) -> list[str]:
        """The blocks that do not stand where the goal has them."""
        return [block for block, below in self.goal.items() if state.get(block) != below]


def _random_state(num_blocks: int, rng: random.Random) -> dict[str, str]:
    """Blocks in random order, each on the table or on a clear block."""
    state: dict[str, str] = {}
    order = list(_NAMES[:num_blocks])
    rng.shuffle(order)
    for block in order:
        clear = [other for other in state if other not in state.values()]
        state[block] = rng.choice([TABLE, *clear])
    return dict(sorted(state.items()))


def _describe(state: State) -> str:
    parts = [f"block {block} is on {_place(below)}" for block, below in state.items()]
    return ", ".join(parts)


def _place(below: str) -> str:
    return "the table" if below == TABLE else f"block {below}"
