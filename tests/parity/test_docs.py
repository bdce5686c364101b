"""docs/verify.md agrees with the rules and the code."""

import re
from pathlib import Path

from tests.parity.expert_mutations import EXPERT_MUTATIONS
from tests.parity.matrix import table
from tests.parity.mutations import FAULTS, fault_table

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "verify.md").read_text()


def test_the_table_of_combinations_is_generated_from_the_rules() -> None:
    shown = re.search(r"<!-- matrix -->\n(.*?)\n<!-- /matrix -->", DOCS, re.DOTALL)
    assert shown is not None
    assert shown[1] == table(), "python -m tests.parity.matrix prints the new one"


def test_the_table_of_faults_is_generated_from_the_tests() -> None:
    shown = re.search(r"<!-- faults -->\n(.*?)\n<!-- /faults -->", DOCS, re.DOTALL)
    assert shown is not None
    assert shown[1] == fault_table(), "python -m tests.parity.mutations prints the new one"


def test_the_number_of_deliberate_faults_is_documented() -> None:
    assert f"{len(FAULTS | EXPERT_MUTATIONS)} deliberate faults" in DOCS
    of_experts = (ROOT / "docs" / "experts.md").read_text()
    assert f"{len(EXPERT_MUTATIONS)} deliberate faults of experts" in of_experts


def test_every_workaround_is_in_the_documented_file() -> None:
    places = re.findall(r"`((?:config|engine|parallel)/\w+\.py)`(?:, `([\w.]+)`)?", DOCS)
    assert len(places) > 8
    for path, name in places:
        assert name.rpartition(".")[2] in (ROOT / "launcher" / path).read_text(), (path, name)
