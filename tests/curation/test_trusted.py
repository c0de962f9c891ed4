"""Encoders from local files: BERT by its formulas, timm towers under foreign names, one line for what is missing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from otcclip.curation import ClipEncoder, TrustedEncoder, clip_encoder
from otcclip.curation.encoders import digest
from otcclip.curation.trusted import load_image_tower, load_sentence_encoder
from otcclip.errors import UserError
from otcclip.models import create_two_tower

tokenizers = pytest.importorskip("tokenizers")
CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 12,
    "vocab_size": 9,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
}
VOCABULARY = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "polar": 5, "bear": 6, "banana": 7, "red": 8}


def weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * 0.3

    state = {
        "embeddings.word_embeddings.weight": rand(9, 12),
        "embeddings.position_embeddings.weight": rand(16, 12),
        "embeddings.token_type_embeddings.weight": rand(2, 12),
        "embeddings.LayerNorm.weight": 1 + rand(12),
        "embeddings.LayerNorm.bias": rand(12),
    }
    for i in range(2):
        for name, (out, inside) in {
            "attention.self.query": (12, 12),
            "attention.self.key": (12, 12),
            "attention.self.value": (12, 12),
            "attention.output.dense": (12, 12),
            "intermediate.dense": (20, 12),
            "output.dense": (12, 20),
        }.items():
            state[f"encoder.layer.{i}.{name}.weight"], state[f"encoder.layer.{i}.{name}.bias"] = (
                rand(out, inside),
                rand(out),
            )
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            state[f"encoder.layer.{i}.{name}.weight"], state[f"encoder.layer.{i}.{name}.bias"] = (
                1 + rand(12),
                rand(12),
            )
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bert")
    (root / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(), root / "model.safetensors")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.save(str(root / "tokenizer.json"))
    return root


def by_hand(ids: list[int]) -> torch.Tensor:
    """Devlin et al., 2019: post-norm attention and feed-forward, one caption at a time, no padding."""
    w = weights()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (12,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    def dense(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(2):
        at = f"encoder.layer.{i}"
        q, k, v = (
            dense(x, f"{at}.attention.self.{part}").view(-1, 3, 4).transpose(0, 1) for part in ("query", "key", "value")
        )
        mixed = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(4), -1) @ v
        x = norm(
            x + dense(mixed.transpose(0, 1).reshape(-1, 12), f"{at}.attention.output.dense"),
            f"{at}.attention.output.LayerNorm",
        )
        x = norm(
            x + dense(F.gelu(dense(x, f"{at}.intermediate.dense")), f"{at}.output.dense"), f"{at}.output.LayerNorm"
        )
    return x


def test_bert_by_its_formulas(folder: Path) -> None:
    pooled, local = load_sentence_encoder(folder)(["a polar bear", "banana", "a red banana bear polar"])
    for i, ids in enumerate(([2, 4, 5, 6, 3], [2, 7, 3], [2, 4, 8, 7, 6, 5, 3])):
        states = by_hand(ids)
        torch.testing.assert_close(pooled[i], F.normalize(states.mean(0), dim=0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(local[i], F.normalize(states[1:-1], dim=1), atol=1e-5, rtol=1e-4)


def test_a_caption_without_a_token_stands_for_itself(folder: Path) -> None:
    pooled, local = load_sentence_encoder(folder)(["", "banana"])
    assert local.sizes.tolist() == [1, 1] and torch.isfinite(pooled).all()


def test_a_file_that_is_missing_or_foreign_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        load_sentence_encoder(tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "gpt2"}))
    with pytest.raises(UserError, match="only BERT encoders"):
        load_sentence_encoder(tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        for other in ("config.json", "model.safetensors", "tokenizer.json"):
            (tmp_path / other).write_bytes((folder / other).read_bytes())
        for bad in (b"", b"[]", b"{}", (folder / name).read_bytes()[:-9]):
            (tmp_path / name).write_bytes(bad)
            with pytest.raises(UserError, match=r"not a sentence encoder|only BERT"):
                load_sentence_encoder(tmp_path)


def test_a_tower_under_foreign_names_gives_the_same_cells(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet", pretrained=False, num_classes=1000).eval()
    torch.save({f"module.{i}": v for i, v in enumerate(network.state_dict().values())}, tmp_path / "w.pth")
    tower = load_image_tower("test_efficientnet", tmp_path / "w.pth", 64)
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = network.forward_features((images - mean) / std).flatten(2).transpose(1, 2)
        torch.testing.assert_close(tower(images), expected, atol=1e-4, rtol=1e-3)


def test_weights_that_are_not_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such weights file"):
        load_image_tower("test_efficientnet", tmp_path / "none.pth")
    (tmp_path / "evil.pth").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(UserError, match="not a weights file"):
        load_image_tower("test_efficientnet", tmp_path / "evil.pth")
    torch.save({"x": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="do not fit timm's test_efficientnet"):
        load_image_tower("test_efficientnet", tmp_path / "other.pth")
    network = timm.create_model("test_efficientnet", pretrained=False, num_classes=10)
    torch.save(network.state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="do not fit timm's test_efficientnet"):
        load_image_tower("test_efficientnet", tmp_path / "other.pth")
    for bad in (torch.zeros(3), {"epoch": 1, "model": {}}, [1]):
        torch.save(bad, tmp_path / "bad.pth")
        with pytest.raises(UserError, match="not a weights file"):
            load_image_tower("test_efficientnet", tmp_path / "bad.pth")
    with pytest.raises(UserError, match="--image-size -5"):
        load_image_tower("test_efficientnet", tmp_path / "other.pth", -5)
    with pytest.raises(UserError, match="timm knows no such model"):
        load_image_tower("no_such_net", tmp_path / "other.pth")


def test_clip_weights_must_be_named_and_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--pretrained: name the weights"):
        clip_encoder("otcclip-tiny", None)
    with pytest.raises(UserError, match="no such file"):
        clip_encoder("otcclip-tiny", str(tmp_path / "none.safetensors"))
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="not weights of otcclip-tiny"):
        clip_encoder("otcclip-tiny", str(tmp_path / "x.safetensors"))
    with pytest.raises(UserError, match="no open_clip_model"):
        clip_encoder("otcclip-tiny", str(tmp_path))


def test_an_encoder_is_known_by_its_weights_as_they_were_given() -> None:
    """A resumed scan must agree in them; that an encoder folds its batch norms makes it no other one."""
    model, again, other = (create_two_tower("otcclip-tiny", seed=seed) for seed in (0, 0, 1))
    given = digest(model)
    assert ClipEncoder(model).identity() == ClipEncoder(again).identity() == {"model": model.name, "weights": given}
    assert ClipEncoder(other).identity() != ClipEncoder(model).identity()
    towers = [timm.create_model("test_efficientnet", pretrained=False) for _ in range(2)]
    names = [TrustedEncoder(tower, model, "two", 64).identity()["weights"] for tower in towers]
    assert names[0] == f"{digest(towers[0])} {given}" != names[1]
