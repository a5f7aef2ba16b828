"""What `run` and `check` say before the first step of a run that could do better."""

from __future__ import annotations

import pytest

from tests.training import tiny
from training import settings
from training.cli import main
from training.data.faults import Place
from training.data.sample import Sample
from training.evaluation.chance import verdicts
from training.evaluation.held_out import Scores
from training.loop import run


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("start"), samples=60)


def write(root, out, *changes):
    """A configuration file of the run over `root`."""
    config = tiny.run_config(root, out)
    file = out.with_suffix(".yaml")
    file.write_text(settings.dump(settings.load(type(config), None, changes, config)))
    return file


@pytest.mark.parametrize(
    ("stages", "language", "noted"),
    [
        ("[dpt,sft,dft]", "null", ["1-dpt"]),
        ("[pt,dpt,sft]", "null", ["1-pt", "2-dpt"]),
        ("[sft,dpt]", "null", []),  # sft has trained the LM
        ("[dpt,dft]", "trained", []),
    ],
)
def test_a_projector_under_random_weights_is_noted(stages, language, noted, root, tmp_path, capsys):
    file = write(root, tmp_path / "run", f"stages={stages}")
    more = [] if language == "null" else ["--set", f"model.path={root / 'teacher'}"]
    assert main(["check", "--config", str(file), *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if "random weights" in line]
    assert [line.split(":")[0] for line in found] == noted
    assert all("leave the stage out" in line and "model.language" in line for line in found)


def test_the_note_comes_before_the_first_step_of_a_run(root, tmp_path):
    config = settings.changed(
        tiny.run_config(root, tmp_path / "run", stages=("dpt",)),
        stage={"dpt": {"steps": 1, "batch_size": 2}},
        data={"held_out": None},
    )
    said = []
    run(config, say=said.append)
    at = [i for i, line in enumerate(said) if "random weights" in line]
    assert len(at) == 1 and at[0] < next(i for i, line in enumerate(said) if "1 steps of" in line)


def test_a_teacher_at_chance_is_told_from_one_that_knows(root, tmp_path, capsys):
    file = write(root, tmp_path / "run", "stages=[sft]", "stage.sft.steps=100")
    ask = ["check", "--config", str(file), "--set", "stages=[sft,dft]", "--ask", "40"]
    assert main(ask) == 0
    ignorant = capsys.readouterr().out
    assert "the teacher on 40 of 60 samples (held_out): exact match 0.0" in ignorant
    assert "note   colour: 0.0" in ignorant and "it has little to give there" in ignorant
    assert main(["run", "--config", str(file)]) == 0
    trained = f"teacher={tmp_path / 'run' / '1-sft' / 'model'}"
    capsys.readouterr()
    assert main([*ask, "--set", trained]) == 0
    knowing = capsys.readouterr().out
    assert "ok     colour: " in knowing
    assert main([*ask[:-1], "0"]) == 2
    assert "--ask: got 0, expected 1 or more" in capsys.readouterr().err


def test_verdicts():
    def samples(kind, *answers):
        return [Sample(Place(kind), (), (("q", answer),), kind=kind) for answer in answers]

    data = [
        *samples("ahead", *["yes"] * 50, *["no"] * 50),
        *samples("behind", *["yes"] * 60, *["no"] * 40),
        *samples("caption", *map(str, range(100))),
    ]
    scores = Scores(
        {"ahead": 0.7, "behind": 0.65, "caption": 0.0},
        {"ahead": 100, "behind": 100, "caption": 100},
    )
    ahead, behind, caption = verdicts(scores, data)
    assert ahead.startswith("ok     ahead: 0.700 (95% 0.604 to 0.781 of 100) are right; ")
    assert "'yes' to all would be in 0.500" in ahead
    assert behind.startswith("note   behind: 0.650") and "no more than chance" in behind
    assert "'yes' to all would be in 0.600" in behind
    assert caption.startswith("note   caption: most answers occur once")
