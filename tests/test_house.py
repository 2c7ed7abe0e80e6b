"""House rules that no single module can keep alone: imports, sizes, what the README promises."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import data_pipelines.cli
import lara_jax.cli

# Training, serving and data never pull in another framework: TensorFlow is the most frequent
# install pain of Open-X users.
FOREIGN = ("tensorflow", "torch", "transformers")
READING_PATH_LINES = 1800
FILE_LINES = 600


def python_files(root: Path) -> list[Path]:
    """Every Python file of the project, sorted."""
    folders = ("lara_jax", "configs", "data_pipelines", "launch", "tests", "benchmarks")
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def text_files(root: Path) -> list[Path]:
    """Every text file that the project writes itself, sorted."""
    listed = [path for path in root.iterdir() if path.is_file() and path.name != "LICENSE"]
    for folder in ("lara_jax", "configs", "data_pipelines", "launch", "tests", "benchmarks"):
        listed += (root / folder).rglob("*")
    listed += [*(root / "docs").rglob("*"), *(root / "requirements").iterdir()]
    suffixes = {".py", ".md", ".sh", ".toml", ".txt", ".yaml", ".yml", ".in", ""}
    return sorted(path for path in listed if path.is_file() and path.suffix in suffixes)


def modules_after(imports: str, root: Path) -> set[str]:
    """Top-level names in `sys.modules` of a fresh interpreter that ran `imports`."""
    code = f"{imports}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "lara_jax.cli",
        "lara_jax.train",
        "lara_jax.checkpoint",
        "lara_jax.inference.policy",
        "lara_jax.serving.server",
        "lara_jax.evals.rollout",
        "lara_jax.interop.hf_keys",
        "data_pipelines.loader",
    ],
)
def test_no_foreign_framework_is_imported(module: str, repository: Path) -> None:
    loaded = modules_after(f"import {module}", repository)
    assert not loaded & set(FOREIGN)


@pytest.mark.parametrize(
    ("table", "verb"),
    [
        *(("lara_jax.cli", verb) for verb in lara_jax.cli.VERBS),
        *(("data_pipelines.cli", verb) for verb in data_pipelines.cli.VERBS),
    ],
)
def test_every_verb_says_how_it_is_called(
    table: str, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(table).main([verb, "--help"])
    assert stop.value.code == 0
    assert verb in capsys.readouterr().out


@pytest.mark.parametrize("recipe", sorted(Path(__file__).parents[1].glob("configs/[!_]*.py")))
def test_a_recipe_reads_without_jax(recipe: Path, repository: Path) -> None:
    code = f"from configs import {recipe.stem}; assert {recipe.stem}.get_config().is_locked"
    loaded = modules_after(code, repository)
    assert not loaded & {"jax", "flax", *FOREIGN}


def test_models_import_only_jax_and_flax(repository: Path) -> None:
    """Imports point one way: of the project, models know each other and the sharding rules."""
    ours = {"lara_jax.models", "lara_jax.sharding"}
    allowed = {"jax", "flax", "numpy", *sys.stdlib_module_names}
    for path in (repository / "lara_jax" / "models").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            for name in names:
                top, *rest = name.split(".")
                known = ".".join([top, *rest[:1]]) in ours if top == "lara_jax" else top in allowed
                assert known, f"{path.name} imports {name}"


def test_reading_path_is_short(repository: Path) -> None:
    """The README names at most five files from the command line to the logits, 1,800 lines."""
    section = (repository / "README.md").read_text().split("## Reading path")[1].split("\n## ")[0]
    files = re.findall(r"^\d\. \[`([\w/.]+)`\]\(([\w/.]+)\)", section, re.MULTILINE)
    assert 1 <= len(files) <= 5
    assert all(name == link for name, link in files)
    lines = sum(len((repository / name).read_text().splitlines()) for name, _ in files)
    assert lines <= READING_PATH_LINES


def test_readme_links_lead_somewhere(repository: Path) -> None:
    for page in [
        repository / "README.md",
        *repository.glob("*/README.md"),
        *repository.glob("docs/*.md"),
    ]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_every_folder_says_what_lives_in_it(repository: Path) -> None:
    folders = {path.parent for path in python_files(repository)} - {repository / "tests"}
    for folder in sorted(folders):
        init = folder / "__init__.py"
        documented = init.is_file() and ast.get_docstring(ast.parse(init.read_text()))
        assert documented or (folder / "README.md").is_file() or "tests" in folder.parts, folder


def test_every_module_has_a_docstring(repository: Path) -> None:
    bare = [
        path.relative_to(repository)
        for path in python_files(repository)
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not bare


def test_files_stay_readable(repository: Path) -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in python_files(repository)}
    assert {name: n for name, n in lengths.items() if n > FILE_LINES} == {}


def test_no_machine_path_is_written_down(repository: Path) -> None:
    """No file names a folder of the machine it was written on."""
    home = re.compile(r"(?<![\w.:/-])/(home|root|work|Users|mnt)/\w+")
    found = [
        f"{path.relative_to(repository)}: {match.group()}"
        for path in text_files(repository)
        for match in home.finditer(path.read_text())
    ]
    assert not found


def test_requirements_are_pinned_and_serve_every_python(repository: Path) -> None:
    """One exact version a package, no marker, no index: the same set for Python 3.11 and 3.12."""
    for path in [repository / "requirements.txt", *(repository / "requirements").glob("*.txt")]:
        names = []
        for line in path.read_text().splitlines():
            if line.startswith("#"):
                continue
            match = re.fullmatch(r"([\w.-]+)==[\w.]+\s*(#.*)?", line)
            assert match, f"{path.name}: {line}"
            names.append(match.group(1))
        assert len(names) == len(set(names)) > 0, path.name
