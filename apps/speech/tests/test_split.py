from pathlib import Path

import pytest

from fedomc_speech.corpus import CorpusError, Utterance, split

SIZES = {"d": 7, "b": 1, "a": 5, "c": 3}
UTTERANCES = [Utterance(speaker, f"{n}", Path("x.wav"), n, 1) for speaker, size in SIZES.items() for n in range(size)]


def speakers(clients):
    return ["".join(dict.fromkeys(utterance.speaker for utterance in client)) for client in clients]


@pytest.mark.parametrize(
    "clients, expected", [(None, ["a", "b", "c", "d"]), (4, ["a", "b", "c", "d"]), (2, ["ac", "bd"]), (1, ["abcd"])]
)
def test_by_speaker(clients, expected):
    parts = split(UTTERANCES, "speaker", clients)
    assert speakers(parts) == expected
    assert sorted(map(str, sum(parts, ()))) == sorted(map(str, UTTERANCES))


def test_order_of_a_speaker_is_kept():
    assert split(UTTERANCES, "speaker")[0] == tuple(u for u in UTTERANCES if u.speaker == "a")


def test_order_of_the_utterances_does_not_matter_to_who_gets_whom():
    assert speakers(split(UTTERANCES[::-1], "speaker", 3)) == speakers(split(UTTERANCES, "speaker", 3))


def test_whole_speakers_are_balanced():
    many = [Utterance(f"{speaker:02}", "", Path("x.wav"), n, 1) for speaker in range(30) for n in range(speaker + 1)]
    sizes = [len(part) for part in split(many, "speaker", 7)]
    assert max(sizes) - min(sizes) <= 3


@pytest.mark.parametrize("clients", [1, 3, 5, 16, None])
def test_iid(clients):
    parts = split(UTTERANCES, "iid", clients)
    sizes = [len(part) for part in parts]
    assert len(parts) == (clients or 4)
    assert max(sizes) - min(sizes) <= 1
    assert sorted(map(str, sum(parts, ()))) == sorted(map(str, UTTERANCES))


def test_iid_follows_the_seed():
    assert split(UTTERANCES, "iid", 3, seed=1) == split(UTTERANCES, "iid", 3, seed=1)
    assert split(UTTERANCES, "iid", 3, seed=1) != split(UTTERANCES, "iid", 3, seed=2)


def test_iid_mixes_the_speakers():
    assert any(len(names) > 1 for names in speakers(split(UTTERANCES, "iid", 4)))


@pytest.mark.parametrize(
    "utterances, kind, clients, message",
    [
        ([], "speaker", None, "no utterances"),
        ([], "iid", 2, "no utterances"),
        (UTTERANCES, "random", None, "'random'; there are 'speaker' and 'iid'"),
        (UTTERANCES, "speaker", 5, "5 clients cannot share 4 speakers; choose 1 to 4"),
        (UTTERANCES, "iid", 17, "17 clients cannot share 16 utterances"),
        (UTTERANCES, "speaker", 0, "0 clients"),
        (UTTERANCES, "iid", -1, "-1 clients"),
    ],
)
def test_errors(utterances, kind, clients, message):
    with pytest.raises(CorpusError, match=message):
        split(utterances, kind, clients)
