"""The audit fails on what it has not looked at, on findings, and on explanations of nothing."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
CODE = {
    "errors": [],
    "results": [
        {"test_id": "B301", "filename": "./cluster/a.py", "line_number": 3, "issue_text": "pickle"}
    ],
}
SOUND = {"dependencies": [{"name": "numpy", "version": "2.0", "vulns": []}]}
UNSOUND = {
    "dependencies": [
        {"name": "numpy", "version": "2.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"]}]}
    ]
}
UNKNOWN = {"dependencies": [{"name": "numpy", "skip_reason": "not found on PyPI"}]}
PICKLE = '[[code]]\nid = "B301"\nplace = "cluster/a.py"\nreason = "its own"\n'
ADVISORY = '[[package]]\nid = "PYSEC-1"\nplace = "numpy"\nreason = "not called"\n'


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("packages", "explained", "status", "words"),
    [
        (SOUND, PICKLE, 0, "1 of 1 looked up"),
        (UNKNOWN, PICKLE, 2, "NOT LOOKED UP: 1, such as numpy: not found on PyPI"),
        (None, PICKLE, 2, "NOT LOOKED UP at pypi: no network"),
        (UNSOUND, PICKLE, 1, "PYSEC-1 numpy: 2.0, fixed in 2.1"),
        (UNSOUND, PICKLE + ADVISORY, 0, "1 explained"),
        (SOUND, PICKLE + ADVISORY, 1, "PYSEC-1 numpy: no such finding any more"),
        (SOUND, "", 1, "B301 cluster/a.py: line 3: pickle"),
        (SOUND, PICKLE.replace("its own", " "), 1, "B301 cluster/a.py: line 3"),
        (SOUND, PICKLE.replace("a.py", "b.py"), 1, "B301 cluster/b.py: no such finding"),
    ],
)
def test_an_audit_is_clean_only_if_it_looked_and_all_is_explained(
    audit: ModuleType,
    packages: dict[str, object] | None,
    explained: str,
    status: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both tools print what they found in JSON; here two lines of Python print it."""
    (tmp_path / "bandit.json").write_text(json.dumps(CODE))
    (tmp_path / "pip_audit.json").write_text("" if packages is None else json.dumps(packages))
    for tool in ("bandit", "pip_audit"):
        (tmp_path / f"{tool}.py").write_text(
            "import sys, pathlib\n"
            "print(pathlib.Path(__file__).with_suffix('.json').read_text())\n"
            "sys.stderr.write('no network')\n"
        )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "audit.toml").write_text(explained)
    monkeypatch.setattr(audit, "EXPLAINED", tmp_path / "audit.toml")
    assert audit.main([]) == status
    assert words in capsys.readouterr().out


def test_every_explanation_names_a_finding_and_a_reason(audit: ModuleType) -> None:
    import tomllib

    explained = tomllib.loads(audit.EXPLAINED.read_text())
    for one in (*explained["code"], *explained.get("package", [])):
        assert len(one["reason"]) > 20, one
        assert (
            "place" not in one
            or not one["place"].endswith(".py")
            or (ROOT / one["place"]).is_file()
        )
