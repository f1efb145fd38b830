"""A conversation of the bundled model; ``scripts/talk_torch.py`` holds longer ones."""

from scripts.talk_torch import talk


def test_talk_with_edits_and_a_file_gives_the_answers_of_a_full_cache():
    turns = list(talk(n_turns=12, lengths=(40, 120), max_tail=32, window=16, group_size=4))
    assert [turn.number for turn in turns if not turn.is_same] == []
    did = [turn.did for turn in turns]
    assert sum("edited" in x for x in did) == 2 and sum("loaded" in x for x in did) == 1
    assert max(turn.n_tokens for turn in turns) > 400
