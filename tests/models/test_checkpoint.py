"""A saved model is plain open_clip's again, and ours with its local head."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch

from otcclip.errors import UserError
from otcclip.models import TwoTower, create_two_tower, load_two_tower, save_open_clip


@pytest.fixture(scope="module")
def model() -> TwoTower:
    model = create_two_tower("otcclip-tiny", seed=1)
    pixels = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    model.train().image(pixels)  # moves the running statistics, so that they too must survive
    with torch.no_grad():
        model.clip.logit_scale.fill_(1.5)
    return model.eval()


@pytest.fixture(scope="module")
def folder(model: TwoTower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "clip"
    assert save_open_clip(model, folder) == folder / "open_clip_model.safetensors"
    return folder


@torch.no_grad()
@pytest.mark.parametrize("how", ["path", "local-dir"])
def test_plain_open_clip_loads_it(model: TwoTower, folder: Path, how: str) -> None:
    if how == "path":
        loaded = open_clip.create_model("otcclip-tiny", pretrained=str(folder / "open_clip_model.safetensors"))
    else:
        loaded = open_clip.create_model(f"local-dir:{folder}")
    loaded.eval()
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tokens = open_clip.get_tokenizer("otcclip-tiny")(["banana", "polar bear, ice"])
    torch.testing.assert_close(loaded.encode_image(pixels), model.clip.encode_image(pixels))
    torch.testing.assert_close(loaded.encode_text(tokens), model.clip.encode_text(tokens))
    mine = model.clip.state_dict()
    assert loaded.state_dict().keys() == mine.keys()
    assert all(torch.equal(value, mine[name]) for name, value in loaded.state_dict().items())


def test_preprocessing_is_what_the_model_was_trained_with(folder: Path) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    del model
    normalise = next(step for step in preprocess.transforms if hasattr(step, "mean"))
    assert tuple(normalise.mean) == open_clip.OPENAI_DATASET_MEAN
    assert tuple(normalise.std) == open_clip.OPENAI_DATASET_STD


@torch.no_grad()
def test_the_local_head_comes_back_too(model: TwoTower, folder: Path) -> None:
    again = load_two_tower(folder, "otcclip-tiny").eval()
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.image(pixels).local.values, model.image(pixels).local.values)


def test_nothing_else_is_left_in_the_folder(model: TwoTower, folder: Path) -> None:
    save_open_clip(model, folder)
    files = {"open_clip_model.safetensors", "open_clip_config.json", "local_head.safetensors"}
    assert {p.name for p in folder.iterdir()} == files


def test_a_folder_that_cannot_be_written_is_one_line(model: TwoTower, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot write"):
        save_open_clip(model, tmp_path / "run")


def damaged(model: TwoTower, path: Path, kind: str) -> Path:
    """A file at `path` that is no weights of the tiny model, or not all of them."""
    whole = save_open_clip(model, path.parent / "whole").read_bytes()
    if kind in ("dict", "list"):
        torch.save({"a": 1} if kind == "dict" else [1], path)
    elif kind == "code":
        torch.save({"a": Path}, path)
    else:
        path.write_bytes({"empty": b"", "junk": b"junk of a file", "cut": whole[:5000]}[kind])
    return path


KINDS = [*(("w.pt", kind) for kind in ("empty", "junk", "dict", "list", "code"))]
KINDS += [*(("w.safetensors", kind) for kind in ("empty", "junk", "cut"))]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_file_that_is_no_weights_is_one_line(name: str, kind: str, model: TwoTower, tmp_path: Path) -> None:
    path = damaged(model, tmp_path / name, kind)
    with pytest.raises(UserError) as raised:
        create_two_tower("otcclip-tiny", str(path))
    said = str(raised.value)
    assert said.startswith(f"{path}: not weights of otcclip-tiny (") and "\n" not in said
    assert len(said) < len(str(path)) + 200
    assert "weights_only" not in said and "still be loaded" not in said, "torch's advice is to run the file"


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32"])
def test_weights_of_another_model_are_one_line(name: str, folder: Path) -> None:
    path = folder / "open_clip_model.safetensors"
    with pytest.raises(UserError, match=f"not weights of {name}"):
        create_two_tower(name, str(path))


@pytest.mark.parametrize("pretrained", ["nosuch", "nosuch.pt", "", "."])
def test_no_such_weights_are_one_line(pretrained: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="neither a file nor a tag that open_clip has for otcclip-tiny"):
        create_two_tower("otcclip-tiny", pretrained)
    assert not caplog.records, "a line of open_clip's own would be a second one"


@pytest.mark.parametrize("lacks", ["open_clip_model.safetensors", "local_head.safetensors"])
def test_a_folder_that_lacks_weights_is_one_line(lacks: str, model: TwoTower, tmp_path: Path) -> None:
    save_open_clip(model, tmp_path)
    (tmp_path / lacks).unlink()
    with pytest.raises(UserError, match=lacks) as raised:
        load_two_tower(tmp_path, "otcclip-tiny")
    assert "\n" not in str(raised.value)
