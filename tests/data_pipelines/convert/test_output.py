"""Files appear at once, on a disk or under a URL; and Beam is needed by the jobs alone."""

import ast
import subprocess
from pathlib import Path

import fsspec
import pytest

from data_pipelines.convert.output import (
    delete_folder,
    new_file,
    new_folder,
    updated_file,
    write_text,
)

JOBS = {"annotate_job", "lerobot_to_rlds", "rlds_to_array_record", "stats_job"}


@pytest.fixture(params=["local", "file URL", "remote"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folders = {"local": str(tmp_path), "file URL": f"file://{tmp_path}"}
    return folders.get(request.param, f"memory:/{tmp_path}")


def text_of(path: str) -> str | None:
    system, name = fsspec.core.url_to_fs(path)
    return system.cat_file(name).decode() if system.exists(name) else None


def test_a_file_appears_when_it_is_complete(folder: str) -> None:
    path = f"{folder}/a/b.txt"
    with new_file(path) as file:
        file.write_text("new")
        assert text_of(path) is None
    assert text_of(path) == "new"
    with pytest.raises(ValueError, match="midway"), new_file(path) as file:
        file.write_text("half")
        raise ValueError("midway")
    assert text_of(path) == "new"
    write_text(path, "größer")
    assert text_of(path) == "größer"
    system, name = fsspec.core.url_to_fs(f"{folder}/a")
    assert [Path(found).name for found in system.ls(name, detail=False)] == ["b.txt"]


def test_a_file_is_changed(folder: str) -> None:
    path = f"{folder}/c.txt"
    for expected in ("x", "xx"):
        with updated_file(path) as file, open(file, "a") as stream:
            stream.write("x")
        assert text_of(path) == expected


def test_a_folder_of_files(folder: str) -> None:
    with new_folder(f"{folder}/d") as local:
        Path(local).mkdir()
        for name in "ef":
            (Path(local) / name).write_text(name)
    assert [text_of(f"{folder}/d/{name}") for name in "efg"] == ["e", "f", None]
    delete_folder(f"{folder}/d")
    delete_folder(f"{folder}/d")
    assert text_of(f"{folder}/d/e") is None


def test_only_the_jobs_need_beam(repository: Path) -> None:
    """Beam lives in an environment of its own: nothing else may import it or a job."""
    beam = {"apache_beam", "data_pipelines.convert.pipeline"}
    jobs = {f"data_pipelines.convert.{job}" for job in JOBS}
    for folder in ("data_pipelines", "lara_jax", "benchmarks"):
        for path in (repository / folder).rglob("*.py"):
            imported = set()
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    imported |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
            assert not imported & jobs, path
            if path.parent.name != "convert" or path.stem not in {*JOBS, "pipeline"}:
                assert not imported & beam, path


def test_beam_sh_names_the_jobs(repository: Path) -> None:
    run = subprocess.run(
        ["bash", "launch/beam.sh", "pipeline"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr == f"no job pipeline; there are: {', '.join(sorted(JOBS))}\n"
