"""Activation memory: a program (program.py) run on a tape of allocations, forward and backward. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.planning.cost.operations import Operation, run_again


@dataclass(frozen=True)
class Footprint:
    """One micro-batch's bytes in one part of a model: `saved` from its forward to its backward pass.

    What a part is given belongs to it if it keeps it; what it hands on does not. `forward` is the most alive
    at once during the forward pass, beside what parts before it saved, `backward` during the backward pass,
    beside what they and it saved, and `later` in that from where the first weight has its gradient.
    """

    saved: int
    forward: int
    backward: int
    later: int


def footprint(program: Sequence[Operation], recomputed: Sequence[Operation], input_size: int) -> Footprint:
    """Of `program`, of which the stretch `recomputed` is run again in the backward pass."""
    tape, output = _Tape(program, input_size), program[-1].name
    tape.run(
        program, keeps=[one for one in program if one not in recomputed], entrance=recomputed, end=output
    )
    forward = tape.peak
    tape.drop(output)
    saved = tape.peak = tape.live
    tape.hold(f"d_{output}", tape.sizes[output])
    before = saved
    for operation in reversed(program):
        if recomputed and operation is recomputed[-1]:
            tape.run(run_again(recomputed), keeps=recomputed)
        tape.backward(operation)
        if operation.weight and before == saved:
            # From here on the peak is taken anew.
            before, tape.peak = tape.peak, tape.live
        if recomputed and operation is recomputed[0]:
            tape.leave(recomputed)
    return Footprint(saved, forward, max(before, tape.peak) - saved, tape.peak - saved)


class _Tape:
    """Named allocations, and the most that was alive at once."""

    def __init__(self, program: Sequence[Operation], input_size: int) -> None:
        self.sizes = {"input": input_size} | {operation.name: operation.size for operation in program}
        self.held = {"input": input_size}
        self.keepers: list[str] = []  # a tensor's name for each operation that keeps it
        self.live = self.peak = input_size

    def hold(self, name: str, size: int) -> None:
        self.held[name] = self.held.get(name, 0) + size
        self.live += size
        self.passing(0)

    def drop(self, name: str) -> None:
        self.live -= self.held.pop(name, 0)

    def passing(self, size: int) -> None:
        """Something allocated and gone again."""
        self.peak = max(self.peak, self.live + size)

    def run(
        self,
        program: Sequence[Operation],
        *,
        keeps: Sequence[Operation],
        entrance: Sequence[Operation] = (),
        end: str | None = None,
    ) -> None:
        """Forward. What `keeps` save stays, what comes into the stretch `entrance`, and the output `end`."""
        self.keepers += [name for operation in keeps for name in operation.saves] + _comes_in(entrance)
        for index, operation in enumerate(program):
            self.hold(operation.name, operation.size)
            if operation in keeps:
                self.hold(f"{operation.name}+", operation.extra)
            self.passing(operation.scratch + (0 if operation in keeps else operation.extra))
            needed = {name for later in program[index + 1 :] for name in later.inputs}
            for name in {*operation.inputs, operation.name} - needed - {*self.keepers, end}:
                self.drop(name)

    def backward(self, operation: Operation) -> None:
        """From the gradient of its output, `d_NAME`, to those of its inputs."""
        gradient = f"d_{operation.name}"
        if operation.adds:
            size = self.held[gradient]
            self.drop(gradient)
            for index, name in enumerate(operation.inputs):
                self.hold(f"d_{name}", 0 if index else size)
            return
        self.passing(operation.backward_entry)
        for index, name in enumerate(operation.inputs):
            size = operation.gradients[index] if operation.gradients else self.sizes[name]
            if self.held.get(f"d_{name}") and not operation.joins:
                self.passing(2 * size)  # the term, and the sum, which is a tensor of its own
            else:
                self.hold(f"d_{name}", size)
        self.passing(operation.backward_scratch + operation.weight)
        self.drop(gradient)
        self.drop(f"{operation.name}+")
        self._let_go(operation.saves)

    def leave(self, recomputed: Sequence[Operation]) -> None:
        """The stretch is done with: nobody runs it again."""
        self._let_go(_comes_in(recomputed))

    def _let_go(self, names: Sequence[str]) -> None:
        for name in names:
            self.keepers.remove(name)
            if name not in self.keepers:
                self.drop(name)


def _comes_in(stretch: Sequence[Operation]) -> list[str]:
    inside = {operation.name for operation in stretch}
    return sorted({name for operation in stretch for name in operation.inputs} - inside)
