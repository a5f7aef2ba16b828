"""Training from stored hidden states is training with the teacher; a cache that does not fit is an
error; a pass that is killed goes on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mllmkd_kernels as mk
from mllmkd_kernels.batch import ask, run_to_head
from tests.training import tiny
from tests.training.tiny import Killed
from training import journal, settings
from training.anatomy import freeze
from training.config import load
from training.data.collate import Collator
from training.data.dataset import LlavaDataset
from training.data.packing import PackedCollator
from training.data.records import DataError
from training.journal import WriteError
from training.models import CheckpointError, build_model, load_vlm, marks_of
from training.settings import ConfigError
from training.teacher_cache import fill, store, use

ALONE: Any = SimpleNamespace(process_index=0, num_processes=1, is_local_main_process=False)
# two text-only samples, one image, one of two images and two turns, in batches of uneven rows
BATCHES = ([4, 9], [0, 1, 3], [8])


def items(root, processor, template: Any = "chat", teacher: Any = None):
    name = "captions" if template == "pretrain" else "data"
    return LlavaDataset(root / f"{name}.json", root, processor, template=template, teacher=teacher)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_parts(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def data(root):
    return items(root, tiny.processor())


def a_pass(root, folder, data, *, dtype="fp32", teacher=None, marks=None, **manifest):
    model = teacher or load_vlm(root / "teacher")[0]
    fields: dict[str, Any] = dict(
        stage="dft",
        template="chat",
        visual=True,
        dtype=dtype,
        precision="fp32",
        samples=len(data),
        samples_per_shard=4,
        data="",
        name=use.place(str(root / "teacher")),
        teacher=marks or marks_of(str(root / "teacher")),
    )
    return fill.Pass(
        folder=folder,
        teacher=lambda: model,
        dataset=data,
        collator=Collator(tiny.processor()),
        manifest=store.Manifest(**fields | manifest),
        batch_size=3,
        workers=0,
    )


def filled(root, folder, data, **options):
    work = a_pass(root, folder, data, **options)
    work.claim()
    work.fill(ALONE)
    return store.TeacherRows(folder)


@pytest.fixture(scope="module")
def rows(root, data):
    return filled(root, root / "fp32" / "dft", data)


def reading(path, **options):
    loss = options.pop("loss", {})
    cache = {"path": str(path), **options}
    return settings.changed(load(), teacher_cache=cache, stage={"dft": {"loss": loss}})


def student(root):
    """One whose loss differs from sample to sample, as a trained one's does."""
    model, _ = build_model(tiny.model_config(root / "tower"), 0)
    model.lm_head.weight.data *= 4
    return model


def outcome(root, data, teacher, collator, batches=BATCHES, **weights):
    """Terms and gradients of some micro-batches of one optimiser step."""
    model = student(root)
    freeze(model, "projector", "language")
    objective = mk.methods.llava_kd.objective(**weights, backend="eager")
    counts = {"response": 31, "visual": 29, "images": 7}  # any, but the same on both sides
    terms = []
    for chosen in batches:
        batch = collator([data[i] for i in chosen])
        out = mk.distill_batch(objective, model.train(), teacher, batch, counts)
        out.loss.backward()
        terms.append(torch.stack([out.loss.detach(), *out.terms.values()]))
    return terms, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def online(root, data, teacher=None, **weights):
    model = teacher or load_vlm(root / "teacher")[0]
    return outcome(root, data, model, Collator(tiny.processor()), **weights)


def cached(root, data, rows, **weights):
    visual = bool(weights.get("visual", 1) or weights.get("relation", 1))
    collator = use.CachedCollator(Collator(tiny.processor()), rows, visual=visual)
    return outcome(root, data, use.CachedTeacher(rows), collator, **weights)


WEIGHTS = [{}, {"response": 0.0, "ce": 0.3}, {"visual": 0.0, "relation": 0.0}]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_fp32_rows_train_as_the_teacher_does(root, data, rows, weights):
    terms, gradients = cached(root, data, rows, **weights)
    expected, expected_gradients = online(root, data, **weights)
    # The teacher ran in batches of other lengths, so its states differ by fp32 rounding.
    torch.testing.assert_close(terms, expected, rtol=1e-5, atol=1e-6)
    scale = max(float(g.abs().max()) for g in expected_gradients.values())
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5 * scale)


def test_packed_micro_batches(root, data, rows):
    """Their rows lie in another order than padded ones do."""
    collator = use.CachedCollator(PackedCollator(tiny.processor()), rows)
    terms, _ = outcome(root, data, use.CachedTeacher(rows), collator)
    torch.testing.assert_close(terms, online(root, data)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_the_teacher_computes_in_is_stored_exactly(root, data, tmp_path, dtype):
    """The same bits, where the teacher sees the same batches as in the pass."""
    teacher: Any = load_vlm(root / "teacher", dtype=store.DTYPES[dtype])[0]
    rows = filled(root, tmp_path, data, teacher=teacher, dtype=dtype)
    same = ([0, 1, 2], [3], [4, 5, 6])
    terms, gradients = outcome(
        root,
        data,
        use.CachedTeacher(rows),
        use.CachedCollator(Collator(tiny.processor()), rows),
        same,
    )
    expected, expected_gradients = outcome(root, data, teacher, Collator(tiny.processor()), same)
    assert all(torch.equal(a, b) for a, b in zip(terms, expected, strict=True))
    assert all(torch.equal(gradients[name], g) for name, g in expected_gradients.items())


def test_bf16_rows_of_an_fp32_teacher_are_within_their_rounding(root, data, tmp_path):
    """Rounding h to bf16 moves logit v by at most e = 2^-9 sum |W_v||h|, so every p by a factor
    exp(2e), and dKL/dlogits = q - p by exp(2e) - 1 in all; KL itself by 2e max |log p/q|, and e²
    more."""
    rows = filled(root, tmp_path, data, dtype="bf16")
    teacher, model = load_vlm(root / "teacher")[0].requires_grad_(False), student(root)
    collator = Collator(tiny.processor())
    plain: Any = collator([data[i] for i in (0, 1, 4)])
    batch = use.CachedCollator(collator, rows)([data[i] for i in (0, 1, 4)])
    with torch.no_grad():
        head_t = ask(teacher, plain)
        head_s = run_to_head(model, plain)
    mask = plain["input_ids"] == model.config.image_token_id
    loss = mk.LlavaKDLoss(relation=0.0, backend="eager")
    outs, gradients = [], []
    for head in (head_t, use.CachedTeacher(rows)(batch)):
        hidden = head_s.hidden.clone().requires_grad_()
        one = dataclasses.replace(head_s, hidden=hidden, weight=head_s.weight.detach())
        outs.append(loss(one, head, plain["labels"], mask))
        gradients.append(torch.autograd.grad(outs[-1].loss, hidden)[0])
    shift = float((head_t.hidden.abs() @ head_t.weight.abs().T).max()) * 2**-9
    with torch.no_grad():
        log_p, log_q = ((h.hidden @ h.weight.T).log_softmax(-1) for h in (head_t, head_s))
        ratio = float((log_p - log_q).abs().max())
        widest = float(head_s.weight.abs().max())
    row = 1 / min(int((plain["labels"][:, 1:] != -100).sum()), int(mask.sum()))
    error = (gradients[0] - gradients[1]).abs().max()
    assert 0 < error <= 2 * row * math.expm1(2 * shift) * widest
    for term in ("response_kl", "visual_kl"):
        change = (getattr(outs[0], term) - getattr(outs[1], term)).abs()
        assert 0 < change <= 2 * shift * (ratio + 2 * shift), term


def test_a_teacher_with_a_batch_of_its_own(root, tmp_path):
    """Its rows are of its own ids; in training the student's are enough to find them."""
    other = tiny.build_processor(sorted(tiny.WORDS), image_size=16, patch_size=8)
    both = items(root, tiny.processor(), teacher=other)
    work = dataclasses.replace(
        a_pass(root, tmp_path, both), collator=Collator(tiny.processor(), other)
    )
    work.claim()
    work.fill(ALONE)
    data = items(root, tiny.processor())
    terms, _ = cached(root, data, store.TeacherRows(tmp_path))
    expected, _ = outcome(root, both, load_vlm(root / "teacher")[0], work.collator)
    torch.testing.assert_close(terms, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(torch.stack(terms), torch.stack(online(root, data)[0]), rtol=1e-3)

    class Moved(torch.utils.data.Dataset):
        def __getitem__(self, index):
            item: Any = both[index]
            return item | {"teacher": item["teacher"] | {"image_lens": item["image_lens"] + 1}}

    moved = dataclasses.replace(work, folder=tmp_path / "moved", dataset=Moved())
    moved.claim()
    with pytest.raises(
        DataError, match=r"'s0', .*the teacher .* of images of \[5, .* the student .* of \[4"
    ):
        moved.fill(ALONE)


def test_shards_and_manifest_say_what_is_there(root, data, rows):
    names = sorted(file.name for file in rows.folder.iterdir())
    shards = [f"shard-{i:05d}.safetensors" for i in range(4)]
    assert names == ["head.safetensors", "manifest.json", *shards]
    mark = store.mark_of(data[3])
    response, visual = rows.rows(mark)
    assert (len(response), len(visual)) == (mark.response, mark.visual) == (mark.response, 8)
    assert len(rows) == len(data) == 14


# --- a pass that is killed -----------------------------------------------------------------------


@pytest.mark.parametrize("renamed", [False, True], ids=["before the rename", "after it"])
@pytest.mark.parametrize("at", range(6))
def test_a_killed_pass_goes_on(root, data, rows, tmp_path, monkeypatch, at, renamed):
    publish, seen = journal.publish, []

    def kill(staged, target):
        seen.append(target)
        if len(seen) == at + 1 and not renamed:
            staged.write_bytes(staged.read_bytes()[:-7])  # torn
            raise Killed
        publish(staged, target)
        if len(seen) == at + 1:
            raise Killed

    work = a_pass(root, tmp_path, data)
    monkeypatch.setattr(journal, "publish", kill)
    with pytest.raises(Killed):
        work.claim()
        work.fill(ALONE)
    monkeypatch.setattr(journal, "publish", publish)
    whole = {f.name: f.stat().st_mtime_ns for f in tmp_path.glob("shard-*")}
    work.claim()
    assert not list(tmp_path.glob(".*")), "nothing half-written stays"
    work.fill(ALONE)
    store.TeacherRows(tmp_path)
    for name, time in whole.items():
        assert (tmp_path / name).stat().st_mtime_ns == time, f"{name} was made twice"
    for file in rows.folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name
    assert len(list(tmp_path.iterdir())) == 6


def test_processes_share_the_shards(root, data, rows, tmp_path):
    work = a_pass(root, tmp_path, data)
    work.claim()
    for rank in (1, 0):
        state = SimpleNamespace(process_index=rank, num_processes=2, is_local_main_process=False)
        work.fill(state)  # pyright: ignore[reportArgumentType]
        if rank == 1:
            assert sorted(f.name[6:11] for f in tmp_path.glob("shard-*")) == ["00001", "00003"]
            with pytest.raises(CheckpointError, match=r"2 of 4 shards are not there.*00000"):
                store.TeacherRows(tmp_path)
    for file in rows.folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_pass_of_something_else_is_refused(root, data, tmp_path):
    a_pass(root, tmp_path, data).claim()
    other = marks_of(str(root / "tower"))
    with pytest.raises(ConfigError, match=r"else \(teacher.config.json: .* teacher.model.safet"):
        a_pass(root, tmp_path, data, marks=other).claim()
    with pytest.raises(ConfigError, match="dtype: 'fp32' -> 'bf16'"):
        a_pass(root, tmp_path, data, dtype="bf16").claim()
    a_pass(root, tmp_path, data, samples_per_shard=9).claim()
    assert store.Manifest.read(tmp_path).samples_per_shard == 4, "begun with shards of 4"


# --- what does not fit ---------------------------------------------------------------------------


def test_samples_that_were_not_stored(data, rows):
    collator, item = use.CachedCollator(Collator(tiny.processor()), rows), data[0]
    labels = item["labels"].clone()
    labels[labels != -100] += 1
    for changes in (
        {"sample_id": "new"},
        {"labels": labels},
        {"image_lens": torch.tensor([2, 2])},
        {"pixel_values": item["pixel_values"].flip(1)},
        {"image_grid_thw": torch.tensor([[1, 2, 4]])},  # one colour, wide in place of tall
    ):
        name = changes.get("sample_id", "s0")
        with pytest.raises(DataError, match=f"sample {name!r} is not among the 14 stored ones, or"):
            collator([item | changes])


def test_other_data_and_settings_are_found_before_the_first_step(root, data, rows):
    config, collator = reading(rows.folder.parent), Collator(tiny.processor())
    use.use_stored(config, "dft", iter(()), collator)  # a stream
    teacher, _ = use.use_stored(config, "dft", data, collator)
    assert teacher.name.endswith(f"teacher, stored in {rows.folder}")
    with pytest.raises(DataError, match="sample 'c0' is not among the 14"):
        use.use_stored(config, "dft", items(root, tiny.processor(), "pretrain"), collator)
    words = tiny.build_processor(tiny.WORDS[::-1], image_size=16, patch_size=8)
    with pytest.raises(DataError, match=r"sample 's0' .* template, tokenizer or image processor"):
        use.use_stored(config, "dft", items(root, words), collator)
    with pytest.raises(CheckpointError, match=r"dpt: no manifest.json there.*training cache"):
        use.open_rows(config, "dpt")
    unshifted = reading(rows.folder.parent, loss={"shift": False})
    with pytest.raises(ConfigError, match="response_kl reads response:unshifted rows of the teach"):
        use.open_rows(unshifted, "dft")
    moved = root / "moved"
    shutil.copytree(root / "teacher", moved)
    use.open_rows(settings.changed(config, teacher=str(moved)), "dft")
    (moved / "generation_config.json").write_text("{}")  # another model now
    for other in (moved, root / "tower"):
        named = settings.changed(config, teacher=str(other))
        with pytest.raises(
            ConfigError, match=rf"teacher: got .*{other.name}, but .*dft is of .*te"
        ):
            use.open_rows(named, "dft")


def test_response_rows_alone(root, data, tmp_path):
    weights = {"visual": 0.0, "relation": 0.0}
    rows = filled(root, tmp_path / "dft", data, visual=False)
    assert (tmp_path / "dft" / "shard-00000.safetensors").stat().st_size < 4000
    terms, _ = cached(root, data, rows, **weights)
    torch.testing.assert_close(terms, online(root, data, **weights)[0], rtol=1e-5, atol=1e-6)
    use.open_rows(reading(tmp_path, loss=weights), "dft")
    one = reading(tmp_path, loss={"relation": 0.0})
    with pytest.raises(ConfigError, match=r"visual_kl reads visual rows .* holds response rows of"):
        use.open_rows(one, "dft")


def test_damage_is_named(rows, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(rows.folder, folder)
    shard = folder / "shard-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match=r"shard-00002.*cannot be read.*remove it"):
        store.TeacherRows(folder)
    shard.write_bytes(whole)
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(values | {"version": 0}))
    with pytest.raises(CheckpointError, match="version 0, expected 2"):
        store.TeacherRows(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest.json: cannot be used"):
        store.TeacherRows(folder)


@pytest.mark.parametrize(
    ("factor", "dtype", "why"),
    [(float("nan"), "fp32", "NaN or inf"), (1e6, "fp16", "too large for torch.float16")],
)
def test_states_that_are_no_numbers(root, data, tmp_path, factor, dtype, why):
    teacher = load_vlm(root / "teacher")[0]
    teacher.model.language_model.norm.weight.data *= factor
    with pytest.raises(DataError, match=f"sample 's0': the teacher's hidden states are {why}"):
        filled(root, tmp_path, data, teacher=teacher, dtype=dtype)


def test_a_full_disk_leaves_whole_shards(root, data, rows, tmp_path, monkeypatch):
    work = a_pass(root, tmp_path, data)
    work.claim()
    save = store.save_file

    def full(tensors, path):
        if "00002" in path.name:
            raise OSError(28, "No space left on device")
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(store, "save_file", full)
        with pytest.raises(WriteError, match=r"shard-00002.safetensors: .* No space left"):
            work.fill(ALONE)
    work.fill(ALONE)
    shard = "shard-00002.safetensors"
    assert (tmp_path / shard).read_bytes() == (rows.folder / shard).read_bytes()
