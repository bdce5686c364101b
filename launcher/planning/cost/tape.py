"""Activation memory: run operations (operations.py) on a tape of allocations, forward and backward. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.planning.cost.operations import Operation, run_again

Operations = Sequence[Operation]


@dataclass(frozen=True)
class Footprint:
    """Bytes of a micro-batch in a part of a model. An input that the part keeps counts, its output does not.

    `saved` is kept from the forward to the backward pass. `forward` is the peak of the forward pass, without
    the bytes that earlier parts saved. `backward` is the peak of the backward pass, without the bytes that
    this part and earlier parts saved; `later` is the same after the first weight has its gradient.
    `sustained` is `backward` where somebody keeps the gradient of the output, as a pipeline does. `attention`
    is the peak of the backward pass in the core of attention; other weights have their gradients by then.
    """

    saved: int
    forward: int
    backward: int
    later: int
    sustained: int = 0
    attention: int = 0


def footprint(program: Operations, recomputed: Operations, input_size: int) -> Footprint:
    """Return the footprint of `program`, whose operations `recomputed` run again in the backward pass."""
    tape, output = _Tape(program, input_size), program[-1].name
    dropped = {operation.name for operation in recomputed}
    keeps = [operation for operation in program if operation.name not in dropped]
    tape.run(program, keeps=keeps, entrance=recomputed, ends=(output,))
    forward = tape.peak
    tape.drop(output)
    saved = tape.peak = tape.live
    tape.hold(f"d_{output}", tape.sizes[output])
    tape.sustained_peak = tape.live
    before, tape.incoming, attention = saved, tape.sizes[output], saved
    for operation in reversed(program):
        if recomputed and operation is recomputed[-1]:
            again = run_again(recomputed)
            # The operations after the stop do not run, but their inputs are still there.
            waiting = set(_inputs_of(recomputed[len(again) :])) & {each.name for each in again}
            tape.run(again, keeps=recomputed, ends=tuple(waiting))
            for name in waiting - {*tape.keepers}:
                tape.drop(name)
        if operation.name == "core":
            attention = tape.peak_of(operation)
        else:
            tape.backward(operation)
        if (operation.weight or operation.made) and before == saved:
            # `later` is the peak from here on.
            before, tape.peak = tape.peak, tape.live
        if recomputed and operation is recomputed[0]:
            tape.release(_inputs_of(recomputed))
    later = tape.peak - saved
    ends = tape.sustained_peak - saved, attention - saved
    return Footprint(saved, forward, max(before, tape.peak) - saved, later, *ends)


class _Tape:
    """Allocations by name, and the peak of the bytes that are alive."""

    def __init__(self, program: Sequence[Operation], input_size: int) -> None:
        self.sizes = {"input": input_size} | {operation.name: operation.size for operation in program}
        assert len(self.sizes) == len(program) + 1, "each name has one tensor"
        self.held = {"input": input_size}
        self.keepers: list[str] = []  # a tensor's name for each operation that keeps it
        self.live = self.peak = input_size
        # The gradient of the output, until another is added to it, and after that the bytes it still takes.
        self.incoming = self.sustained = self.sustained_peak = 0

    def hold(self, name: str, size: int) -> None:
        self.held[name] = self.held.get(name, 0) + size
        self.live += size
        self.passing(0)

    def drop(self, name: str) -> None:
        self.live -= self.held.pop(name, 0)

    def passing(self, size: int) -> None:
        """Allocate and free `size` bytes."""
        self.peak = max(self.peak, self.live + size)
        self.sustained_peak = max(self.sustained_peak, self.live + size + self.sustained)

    def run(
        self, program: Operations, *, keeps: Operations, entrance: Operations = (), ends: Sequence[str] = ()
    ) -> None:
        """Run forward; keep tensors saved by `keeps`, the inputs of `entrance`, and the outputs `ends`."""
        self.keepers += [name for operation in keeps for name in operation.saves] + _inputs_of(entrance)
        kept, keeping = {*self.keepers, *ends}, {operation.name for operation in keeps}
        last_use = {name: index for index, operation in enumerate(program) for name in operation.inputs}
        for index, operation in enumerate(program):
            self.hold(operation.name, operation.size)
            if operation.name in keeping:
                self.hold(f"{operation.name}+", operation.extra + operation.made)
            self.passing(operation.scratch + (0 if operation.name in keeping else operation.extra))
            for name in {*operation.inputs, operation.name} - kept:
                if last_use.get(name, index) <= index:
                    self.drop(name)

    def backward(self, operation: Operation) -> None:
        """Replace the gradient of the output, `d_NAME`, by the gradients of the inputs."""
        gradient = f"d_{operation.name}"
        if operation.adds:
            size = self.held[gradient]
            self.drop(gradient)
            for index, name in enumerate(operation.inputs):
                self.hold(f"d_{name}", 0 if index else size)
            return
        self.passing(operation.backward_entry)
        sustained = self.sustained
        for index, name in enumerate(operation.inputs):
            size = operation.gradients[index] if operation.gradients else self.sizes[name]
            if self.held.get(f"d_{name}") and not operation.joins:
                self.passing(2 * size)  # the term, and the sum in a new tensor
                sustained = self.incoming
            else:
                self.hold(f"d_{name}", size)
        self.passing(operation.backward_scratch + operation.weight)
        self.sustained = sustained  # the sum is made after the operation's own work
        self.drop(gradient)
        self.drop(f"{operation.name}+")
        self.release(operation.saves)

    def peak_of(self, operation: Operation) -> int:
        """Run `backward`; return the most bytes that are alive in this operation."""
        before, self.peak = self.peak, self.live
        self.backward(operation)
        peak, self.peak = self.peak, max(self.peak, before)
        return peak

    def release(self, names: Sequence[str]) -> None:
        """Drop one keeper of each tensor, and free the tensors that no operation keeps."""
        for name in names:
            self.keepers.remove(name)
            if name not in self.keepers:
                self.drop(name)


def _inputs_of(operations: Sequence[Operation]) -> list[str]:
    inside = {operation.name for operation in operations}
    return sorted({name for operation in operations for name in operation.inputs} - inside)
