"""Do the launch parameters of the tables run on the GPU that is here, and does the tuner?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mllmkd_kernels import tune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = tune.Sizes(rows=256, vocab=4099, d_s=128, d_t=256, image_rows=150, images=3, chunk=128)


@pytest.mark.parametrize("job", tune.jobs(), ids=lambda job: f"{job.kernel}-{job.kind}")
def test_built_in_parameters_run_and_candidates_agree_with_them(job: tune.Job) -> None:
    small = tune.Job(job.kernel, job.kind, job.dtype, job.prepare, job.candidates[:3])
    outcome = tune.search(small, SIZES, torch.device("cuda", 0), tune.cuda_timer, rounds=2)
    assert outcome.seconds_best > 0
    assert not [why for why in outcome.refused if "is off by" in why]


def test_the_command_writes_a_table_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mllmkd_kernels.backends.triton import tables

    path = tmp_path / "tables.json"
    monkeypatch.setenv("MLLMKD_TABLES", str(path))
    monkeypatch.setattr(tune, "Sizes", lambda: SIZES)
    assert tune.main(["--kernel", "rows", "--quick"]) == 0
    assert "written" in capsys.readouterr().out
    entry = tables.read(path)[torch.cuda.get_device_name()]["rows"]["single"]
    assert tables.launch("rows", torch.device("cuda", 0)) == entry
