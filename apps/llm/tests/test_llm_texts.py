"""The texts of the clients, embedded or from a folder: what is held out is not trained with."""

from pathlib import Path

import pytest
import torch

from fedomc_llm import models, texts
from fedomc_llm.errors import TextError


def test_twelve_roles_are_embedded_and_no_client_has_the_public_text() -> None:
    roles = texts.read()
    assert len(roles) == 12 and [role.name for role in roles] == sorted(role.name for role in roles)
    assert "To be, or not to be" in next(role.train for role in roles if role.name == "hamlet")
    assert sum(path.stat().st_size for path in texts.PLAYS.rglob("*.md")) < 650_000
    for role in roles:
        assert 0.08 < len(role.held_out) / len(role.train + role.held_out) < 0.12
        assert role.train.isascii() and role.train[1000:1200] not in texts.public()


def test_a_text_is_divided_at_a_line(four: Path) -> None:
    clients = texts.read(str(four))
    assert len(clients) == 4
    for client in clients:
        (path,) = four.glob(f"{client.name}.*")
        assert client.train + client.held_out == path.read_text(encoding="utf-8")
        assert client.train.endswith("\n") and client.held_out


@pytest.mark.parametrize(
    ("content", "says"), [(None, "has no file"), ("", "0 characters"), ("one line", "8 characters")]
)
def test_texts_that_cannot_be_used_are_named(content: str | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "short.txt").write_text(content)
    with pytest.raises(TextError, match=says) as raised:
        texts.read(str(tmp_path))
    assert str(tmp_path) in str(raised.value)


def test_blocks_have_the_tokens_of_the_text_in_order() -> None:
    tokenizer = models.byte_tokenizer()
    text = "Sense sure you have, é else could you not have motion"
    found = texts.blocks(text, tokenizer, 8, "text")
    expected = torch.tensor(tokenizer(text)["input_ids"])
    assert found.shape == (len(text.encode()) // 8, 8)
    assert torch.equal(found.flatten(), expected[: found.numel()])
    assert tokenizer.decode(expected) == text
    with pytest.raises(TextError, match="the text of hamlet has 2 tokens, but a block has 8"):
        texts.blocks("hm", tokenizer, 8, "text of hamlet")
