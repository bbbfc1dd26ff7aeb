"""Which packages a machine lacks: as few as will do, at the tested versions, and never torch."""

import json

import pytest
from packaging.requirements import Requirement

from tests.benchmarks.on_gpu import ROOT, wheels

PINNED = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line and not line.startswith("#")
)
PINS = {wheels.canonicalize_name(name): version for name, version in PINNED.items()}
RUNS = ("roles", "runs")


def there(**packages: str) -> dict[str, wheels.Package]:
    return {name.replace("_", "-"): wheels.Package(version) for name, version in packages.items()}


@pytest.mark.slow
def test_the_table_is_what_the_tested_environment_needs():
    table = wheels.table()
    written = json.loads(wheels.TABLE.read_text())
    if all(entry["version"] == written[name]["version"] for name, entry in table.items()):
        assert {name: entry["requires"] for name, entry in written.items()} == {
            name: entry["requires"] for name, entry in table.items()
        }, "run python benchmarks/on_gpu/wheels.py"
    else:
        # Newer releases may need other versions of their own parts, but no other packages.
        assert set(written) == set(table)
    pinned = {name: entry["version"] for name, entry in written.items() if name in PINS}
    assert pinned == {name: PINS[name] for name in pinned}
    assert len(pinned) > 0.9 * len(written)


def test_on_a_machine_with_torch_alone_all_is_fetched_but_torch():
    missing = wheels.find_missing(RUNS, there(torch="2.11.0", triton="3.6.0"), "3.12")
    assert {"diffusers", "pydantic", "pyarrow", "pydantic-core", "huggingface-hub"} < set(missing)
    assert not [name for name in missing if name.startswith(("torch", "triton", "nvidia", "ray"))]
    assert "pandas" in wheels.find_missing(("ray",), {}, "3.12")


@pytest.mark.slow
def test_on_the_tested_environment_nothing_is_fetched():
    assert wheels.find_missing(wheels.GROUPS, wheels.installed(), "3.11") == {}


def test_what_is_there_stays_if_it_will_do():
    have = there(
        torch="2.11.0", numpy="2.5.2", transformers="5.17.0", huggingface_hub="1.33.0",
        tokenizers="0.23.2", safetensors="0.8.0",
    )  # fmt: skip
    missing = wheels.find_missing(("roles",), have, "3.12")
    assert "diffusers" in missing
    assert not set(have) & set(missing)


def test_what_is_too_old_is_replaced_and_so_is_what_cannot_stand_the_new_one():
    old = there(torch="2.11.0", huggingface_hub="1.0.0", transformers="4.60.0", numpy="2.5.2")
    assert "huggingface-hub" in wheels.find_missing(("roles",), old, "3.12")
    assert "transformers" not in wheels.find_missing(("roles",), old, "3.12")
    choosy = old | {"transformers": wheels.Package("4.60.0", ("huggingface-hub<1.1",))}
    assert "transformers" in wheels.find_missing(("roles",), choosy, "3.12")


def test_a_release_candidate_of_the_machine_counts():
    have = there(torch="2.11.0", numpy="2.5.0rc1")
    assert "numpy" not in wheels.find_missing(("roles",), have, "3.12")


def test_the_command_names_every_version_and_lets_pip_add_nothing():
    command = wheels.download_command({"diffusers": "0.42.1"}, "3.12", "some/wheels")
    for part in ("--no-deps", "--only-binary=:all:", "--python-version 3.12", "-d some/wheels"):
        assert part in command
    assert command.endswith("diffusers==0.42.1")
    assert "-c constraints.txt" in command


def test_a_list_of_another_machine_is_read(tmp_path):
    (tmp_path / "have.txt").write_text("numpy==2.5.2\n# none\nHuggingface_Hub==1.33.0\n-e .\n")
    assert wheels.listed(tmp_path / "have.txt") == there(numpy="2.5.2", huggingface_hub="1.33.0")


@pytest.mark.parametrize("group", wheels.GROUPS)
def test_groups_name_dependencies_with_their_lowest_version(group):
    assert all(str(Requirement(root).specifier) for root in wheels.roots_of(group))


def test_a_folder_without_the_wheels_leaves_them_missing(tmp_path):
    assert wheels.install({"diffusers": "0.42.1"}, tmp_path, tmp_path / "site") == {
        "diffusers": "0.42.1"
    }
    assert not (tmp_path / "site").exists()
