"""The families of faults, by name."""

from tests.faults import processes

FAMILIES = {module.FAMILY.name: module.FAMILY for module in (processes,)}
