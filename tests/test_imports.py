"""Who imports whom: docs/architecture.md is true, and dependencies point one way."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from files import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FOLDERS = [path.parent.name for path in ROOT.glob("*/*.py")]
FILES = sorted(
    path.relative_to(ROOT)
    for folder in {"", *FOLDERS} - {"tests"}
    for path in (ROOT / folder).glob("*.py")
)
TOP = {path.stem for path in ROOT.glob("*.py")} | {*FOLDERS}
FOR_ALL = {"errors", "fast_blas", "padding", "right_python", "waiting"}
PYTORCH = {"torch", "transformers", "peft", "trl", "accelerate"}
# mlx-lm's parts that change between releases, by the name they are imported under.
UNSTABLE = {"BatchGenerator", "BatchKVCache", "linear_to_lora_layers", "load_model"}


@functools.cache
def imports(file: Path) -> list[tuple[str, str]]:
    """(module, imported name or "") of every import in a file, those inside functions too."""
    return list(_imports(file))


def _imports(file: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide from this test"
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            assert name not in ("import_module", "__import__"), f"{file}: hides from this test"


def roots(file: Path) -> set[str]:
    return {module.partition(".")[0] for module, _ in imports(file)}


def unit(file: Path) -> str:
    """The folder of a file, or its own name at the top."""
    return file.parts[0] if len(file.parts) > 1 else file.stem


def importers(libraries: set[str]) -> set[str]:
    """Files that import one of these."""
    return {file.as_posix() for file in FILES if roots(file) & libraries}


def project_imports() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for file in FILES:
        own = unit(file)
        found.setdefault(own, set()).update((roots(file) & TOP) - FOR_ALL - {own})
    return found


def page_imports() -> dict[str, set[str]]:
    """The table of docs/architecture.md."""
    table = PAGE.partition("| what | imports |")[2].partition("\n\n")[0]
    found = {}
    for line in table.splitlines()[2:]:
        left, right = (re.findall(r"`(\w+)(?:/|\.py)`", cell) for cell in line.split("|")[1:3])
        found |= {name: set(right) for name in left}
    return found


def test_the_page_s_table_is_what_is_imported():
    found, said = project_imports(), page_imports()
    assert found.pop("benchmarks")  # anything
    assert found.pop("examples") == set()  # what a person copies stands alone
    assert not any(found.pop(name) for name in FOR_ALL)
    assert found == said


def test_imports_in_the_page_s_picture_go_down():
    level = levels()
    assert {*page_imports()} - {*level} == {"adlf", "data", "pytorch_baseline"}
    for name, targets in page_imports().items():
        for target in targets - ({"data_loading"} if name == "data_utils" else set()):
            assert level.get(name, -1) < level[target], f"{name} imports {target}"


def module_files() -> dict[str, Path]:
    """Every file of the project under the name it is imported by."""
    names = {".".join(file.with_suffix("").parts): file for file in FILES}
    # Scripts beside their helpers import those by their bare names.
    flat = {f.stem: f for f in FILES if f.parts[0] in ("benchmarks", "pytorch_baseline", "data")}
    return flat | names


def graph(files: dict[str, Path]) -> dict[Path, set[Path]]:
    """Which files each file imports, inside functions too."""
    return {
        file: {
            files[name]
            for module, part in imports(file)
            for name in (module, f"{module}.{part}")
            if name in files
        }
        - {file}
        for file in files.values()
    }


def circles(edges: dict) -> list[list]:
    """Paths that come back to where they began."""
    found, done = [], set()

    def follow(node, path: tuple) -> None:
        if node in path:
            found.append([*path[path.index(node) :], node])
        elif node not in done:
            for target in edges.get(node, ()):
                follow(target, (*path, node))
            done.add(node)

    for node in edges:
        follow(node, ())
    return found


def test_no_file_imports_itself_over_others():
    edges = graph(module_files())
    assert len(edges) > 150
    assert circles(edges) == []


def test_a_circle_is_found_where_one_is_added():
    edges = graph(module_files())
    low, high = Path("command_line/values.py"), Path("command_line/option_files.py")
    assert low in edges[high] and high not in edges[low]
    edges[low] = edges[low] | {high}
    assert any({low, high} <= set(circle) for circle in circles(edges))


def levels() -> dict[str, int]:
    """The line of the page's picture that each room stands in; imports go down."""
    lines = PAGE.split("```")[1].splitlines()
    return {
        name: number
        for number, line in enumerate(lines)
        for name in re.findall(r"(\w+)(?:\.py|/)", line)
    }


def upward(edges: dict[Path, set[Path]]) -> list[tuple[Path, Path]]:
    """Imports of a file from a room that does not stand below its own."""
    level = levels()
    return [
        (file, target)
        for file, targets in edges.items()
        for target in targets
        if unit(file) != unit(target)
        and {unit(file), unit(target)} <= {*level}
        and not (unit(file) == "data_utils" and unit(target) == "data_loading")  # its parts
        and level[unit(file)] >= level[unit(target)]
    ]


def test_no_file_imports_upward():
    edges = graph(module_files())
    assert upward(edges) == []
    low, high = Path("run_folder/run.py"), Path("command_line/parser.py")
    assert upward({low: {high}}) == [(low, high)]
    assert upward({Path("training/memory.py"): {high}}), "training knows nothing of flags"


# fewer than so many files of the project beside its own; the group trainer has two kinds of
# statistics
TRAINERS = {"mlx_sft_trainer": 25, "mlx_ppo_trainer": 25, "mlx_group_trainer": 27}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_brings_in_few_files(trainer):
    """And no run folder, parser or W&B; seen in a process of its own."""
    code = f"import {trainer}, sys; print(*[m for m in sys.modules if '__main__' not in m])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    ours = {module_files()[name] for name in loaded & {*module_files()} - {trainer}}
    assert 10 < len(ours) < TRAINERS[trainer], sorted(map(str, ours))
    assert not {unit(file) for file in ours} & {"run_folder", "command_line", "reports", "rewards"}
    assert "wandb" not in loaded


def test_nothing_is_imported_from_a_test_file():
    """What tests share stands in tests/helpers."""
    line = re.compile(r"^ *(?:from|import) (conftest|test_\w+)", re.M)
    assert line.findall("from test_chat import LORA\n    import conftest\n") == [
        "test_chat",
        "conftest",
    ]
    for file in (ROOT / "tests").rglob("*.py"):
        assert not line.findall(file.read_text(encoding="utf-8")), file


def test_nothing_imports_a_script():
    scripts = {f.stem for f in FILES if '__name__ == "__main__"' in (ROOT / f).read_text("utf-8")}
    assert {"sft", "ppo_training", "fuse", "pytorch_sft", "generate_digit_data"} <= scripts
    # adlf/training.py has the name of a package, and is reached as adlf.training alone.
    scripts -= {file.parts[0] for file in FILES if len(file.parts) > 1}
    assert "training" not in scripts and not any("adlf" in roots(f) - {unit(f)} for f in FILES)
    for file in FILES:
        found = roots(file) & scripts
        if unit(file) == "benchmarks":  # they share helpers, and bench.py runs the others
            found = {name for name in found if not (ROOT / "benchmarks" / f"{name}.py").exists()}
        assert not found, file


@pytest.mark.parametrize("folder", ["models", "rl", "data_loading"])
def test_folders_below_import_no_other(folder):
    files = [file for file in FILES if unit(file) == folder]
    assert len(files) > 5
    allowed = {folder, *FOR_ALL, *({"safe_files"} if folder == "models" else ())}
    for file in files:
        assert roots(file) & TOP <= allowed, file


@pytest.mark.parametrize("name", ["losses", "advantages", "kl"])
def test_the_arithmetic_imports_mlx_alone(name):
    assert roots(Path("rl", f"{name}.py")) == {"mlx"}


def test_pytorch_stays_in_the_baseline():
    outside = {name for name in importers(PYTORCH) if not name.startswith("pytorch_baseline/")}
    allowed = {
        "models/encoder_reward.py",
        "benchmarks/trl_worker.py",
        "benchmarks/trl_dpo_worker.py",
        "benchmarks/trl_group_worker.py",
        "benchmarks/smollm2.py",
    }
    assert outside == allowed
    assert all(f"`{name}`" in PAGE for name in allowed)
    # Optional: nothing of it is imported with the module.
    top = ast.parse((ROOT / "models/encoder_reward.py").read_text(encoding="utf-8")).body
    names = [
        n.names[0].name if isinstance(n, ast.Import) else n.module
        for n in top
        if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    assert not {name.partition(".")[0] for name in names} & PYTORCH


def loaded_with(file: Path) -> Iterator[str]:
    """Modules that a file imports when it is imported itself; not those inside functions."""
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def way_to_mlx(file: Path) -> list[Path]:
    """Files that import one the other from `file` on until one imports MLX; [] where none does."""
    files, ways = module_files(), [[file]]
    seen = {file}
    for way in ways:
        for module in loaded_with(way[-1]):
            if module.partition(".")[0] in ("mlx", "mlx_lm"):
                return way
            if module in files and files[module] not in seen:
                seen.add(files[module])
                ways.append([*way, files[module]])
    return []


LOOPS = ("supervised_loop", "rollout_loop", "group_loop", "checkpointed", "launch")


def test_the_twin_and_the_loops_load_no_mlx():
    twin = [file for file in FILES if unit(file) == "pytorch_baseline"]
    assert len(twin) > 10
    for file in (*twin, *(Path("training", f"{name}.py") for name in LOOPS)):
        assert not way_to_mlx(file), way_to_mlx(file)
    for file in twin:  # inside functions too
        assert not roots(file) & {"mlx", "mlx_lm", "mlx_ppo_trainer", "mlx_sft_trainer"}, file
    assert way_to_mlx(Path("training/mlx_backend.py")), "a way is found where there is one"


def test_mlx_lm_is_reached_through_models():
    outside = {
        name for name in importers({"mlx_lm"}) if not name.startswith(("models/", "benchmarks/"))
    }
    assert outside == {"chat/speaker.py", "data/make_digits_model.py", "fast_blas.py"}
    assert all(f"`{name}`" in PAGE for name in outside)
    used = {
        file.as_posix()
        for file in FILES
        for module, name in imports(file)
        if module.startswith("mlx_lm") and name in UNSTABLE
    }
    assert used and all(name.startswith(("models/", "benchmarks/")) for name in used)


def test_what_the_page_names_is_there():
    words = set(re.findall(r"`([^`\s]+)`", PAGE))
    source = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in FILES)
    for word in words:
        if re.fullmatch(r"[\w/]+(\.py|\.md|/)", word):
            assert (ROOT / word).exists(), word
        elif re.fullmatch(r"[A-Za-z_][\w.]*", word):
            assert re.search(rf"\b{word.rpartition('.')[2]}\b", source), word
    placed = re.findall(r"`(\w+)` (?:of|\()\s*`?([\w/]+\.py)`", PAGE)
    assert ("make_rewards", "command_line/reward_flags.py") in placed
    for name, file in placed:
        assert re.search(rf"^(def |class )?{name}\b", (ROOT / file).read_text("utf-8"), re.M), name
