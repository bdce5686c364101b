"""The families of faults, by name."""

from tests.faults import command_lines, corruptions, processes, secrets, wandb

FAMILIES = {
    module.FAMILY.name: module.FAMILY for module in (processes, corruptions, command_lines, wandb, secrets)
}
