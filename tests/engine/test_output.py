"""Where texts end, what a stream shows and when, and what the statistics count, on a model whose text is known."""

import itertools
from functools import cache

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from medusa_engine import Medusa
from medusa_engine.output import Stats, Transcript
from medusa_engine.tokenizer import Tokenizer
from tests.engine.models import EOS, SPOKEN, counting_folder, counting_heads_folder, spoken, token

VOCAB = len(SPOKEN)
STOPS = ["e", "ef", "fg", "defgh", "j", "stop", " stop", "op th", "p the pre", "the", "!", "\nfin", "fini", "é", "😀"]


@cache
def counting(patchy: bool = False, tree: str = "chain-3") -> Medusa:
    """With heads that are always right a step brings four tokens: after "a", first b, then c d e f, g h i j, ..."""
    heads = counting_heads_folder(4, patchy)
    return Medusa.from_pretrained(counting_folder(), heads, dtype="float32", tree=tree)


def after(first: int, count: int) -> list[int]:
    return [(first + 1 + i) % VOCAB for i in range(count)]


def stream(engine: Medusa, *arguments, **options):
    chunks = list(engine.stream(*arguments, **options))
    return "".join(c.text for c in chunks), [t for c in chunks for t in c.token_ids], chunks


@pytest.mark.parametrize("medusa", [True, False])
@pytest.mark.parametrize("before_eos", range(8))
def test_eos_ends_the_ids_and_not_the_text(before_eos, medusa):
    first = VOCAB - 1 - before_eos
    out = counting().generate([first], 20, medusa=medusa)
    expected = [*range(first + 1, VOCAB), EOS]
    assert (out.token_ids, out.finish_reason) == (expected, "eos")
    assert out.text == spoken(expected[:-1])
    assert stream(counting(), [first], 20, medusa=medusa)[:2] == (out.text, out.token_ids)
    if medusa:  # the step that met EOS counts whole, also when it brought more
        assert out.stats.steps == -(-before_eos // 4)
        assert out.stats.accepted == 4 * out.stats.steps


def test_ignore_eos_goes_on_and_shows_no_special_token():
    out = counting().generate([VOCAB - 3], 8, ignore_eos=True)
    assert out.token_ids == after(VOCAB - 3, 8)
    assert (out.text, out.finish_reason) == ("UVabcde", "length")


@pytest.mark.parametrize("medusa", [True, False])
@pytest.mark.parametrize("count", [*range(1, 12), 60])
def test_max_new_tokens_is_exact(count, medusa):
    out = counting().generate("a", count, medusa=medusa)
    assert out.token_ids == after(token("a"), count)
    assert out.finish_reason == "length"
    assert out.text == counting().tokenizer.decode(out.token_ids) == spoken(out.token_ids)
    assert stream(counting(), "a", count, medusa=medusa)[:2] == (out.text, out.token_ids)


@pytest.mark.parametrize("medusa", [True, False])
@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_string_ends_the_text_before_it(stop, medusa):
    whole = spoken(after(token("a"), 50))
    out = counting().generate("a", 50, stop=stop, medusa=medusa)
    assert out.finish_reason == "stop"
    assert out.text == whole[: whole.index(stop)]
    assert stop in spoken(out.token_ids)
    assert stop not in spoken(out.token_ids[:-1])  # the last token completed it
    assert out.token_ids == after(token("a"), len(out.token_ids))
    text, ids, chunks = stream(counting(), "a", 50, stop=stop, medusa=medusa)
    assert (text, ids) == (out.text, out.token_ids)
    assert all(c.token_ids for c in chunks)


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (["hij", "def"], "bc"),
        (["def", "hij"], "bc"),
        (["never", "f", "e"], "bcd"),  # one step brings both: the earlier one ends the text
        (["bcdefg", "d"], "bc"),  # the one that is complete first, though another began before it
        (["he", " the"], "bcdefghijklmnopqrstuvwxyz 😀é stop"),  # one token completes both: the one that begins first
        (["never", "Never"], None),
        ((), None),
    ],
)
def test_of_several_stops_the_first_wins(stops, text):
    for medusa in (True, False):
        out = counting().generate("a", 45, stop=stops, medusa=medusa)
        assert out.text == (spoken(after(token("a"), 45)) if text is None else text)
        assert out.finish_reason == ("length" if text is None else "stop")


def test_a_stop_in_the_first_token():
    out = counting().generate("a", 9, stop="b")
    assert (out.text, out.token_ids, out.finish_reason, out.stats.steps) == ("", [token("b")], "stop", 0)
    assert stream(counting(), "a", 9, stop="b")[0] == ""


def test_a_stop_that_the_limit_or_eos_reaches_first():
    out = counting().generate("a", 4, stop="ef")  # b c d e: e may be held back, and is shown in the end
    assert (out.text, out.finish_reason) == ("bcde", "length")
    out = counting().generate([VOCAB - 2], 9, stop="a")
    assert (out.text, out.finish_reason) == ("V", "eos")
    out = counting().generate("a", 5, stop="f")  # in the last token allowed: still a stop
    assert (out.text, out.finish_reason) == ("bcde", "stop")
    out = counting().generate([VOCAB - 4], 9, stop="UV")
    assert (out.text, out.finish_reason) == ("T", "stop")
    out = counting().generate("a", 3, stop="�")
    assert (out.text, out.finish_reason) == ("bcd", "length")


def test_a_stream_holds_back_what_may_become_a_stop():
    chunks = list(counting().stream("a", 13, stop=["fgX", "ijklmno"]))
    assert [c.text for c in chunks] == ["b", "cde", "fgh", "ijklmn"]
    assert [c.text for c in counting().stream("a", 16, stop=["fgX", "ijklmno"])] == ["b", "cde", "fgh", "", ""]


def test_a_stream_shows_no_half_character():
    first = token("x")
    for count in range(1, 12):
        for tree in ("root", "chain-1", "chain-3"):
            text, ids, chunks = stream(counting(tree=tree), [first], count)
            assert ids == after(first, count)
            assert text == spoken(ids) == counting(tree=tree).tokenizer.decode(ids)
            assert "�" not in "".join(c.text for c in chunks[:-1])
    assert counting().generate([first], 5).text == "yz �"  # ended inside the emoji
    assert counting().generate([first], 7).text == "yz 😀"


def test_a_stream_begins_with_the_prefill_and_has_a_chunk_a_step():
    engine = counting(patchy=True)
    out = engine.generate("a", 40)
    text, ids, chunks = stream(engine, "a", 40)
    assert (text, ids) == (out.text, out.token_ids)
    assert (chunks[0].token_ids, chunks[0].accept_length, chunks[0].text) == ([token("b")], 0, "b")
    assert len(chunks) == out.stats.steps + 1
    assert sum(c.accept_length + 1 for c in chunks[1:]) == out.stats.accepted
    assert all(len(c.token_ids) == c.accept_length + 1 for c in chunks[1:-1])
    assert {c.accept_length for c in chunks[1:]} == {0, 1, 2, 3}


def test_streams_take_turns():
    engine = counting(patchy=True)
    alone = [stream(engine, prompt, 30)[1] for prompt in ("a", "M")]
    first, second = engine.stream("a", 30), engine.stream("M", 30)
    seen: list[list[int]] = [[], []]
    while True:
        chunks = [next(first, None), next(second, None)]
        engine.generate("k", 5)
        for ids, chunk in zip(seen, chunks, strict=True):
            ids += chunk.token_ids if chunk else []
        if chunks == [None, None]:
            break
    assert seen == alone
    abandoned = engine.stream("a", 30)
    next(abandoned)
    del abandoned
    assert engine.generate("M", 30).token_ids == alone[1]


def test_statistics_count_as_the_contract_says():
    engine = counting(patchy=True)
    prompts = ["a", "M", "kl", [VOCAB - 1]]  # the last one's first token is EOS
    out = engine.generate(prompts, 30)
    per_sequence = out.stats.per_sequence
    for prompt, ids, stats in zip(prompts, out.token_ids, per_sequence, strict=True):
        chunks = list(engine.stream(prompt, 30))
        assert stats.new_tokens == len(ids)
        assert stats.steps == len(chunks) - 1
        accepted = sum(c.accept_length + 1 for c in chunks[1:])
        assert stats.tokens_per_step == (accepted / stats.steps if stats.steps else 1.0)
        assert stats.prefill_seconds > 0
        speed = (stats.new_tokens - 1) / stats.decode_seconds if stats.steps else 0.0
        assert stats.tokens_per_second == speed
        assert (stats.decode_seconds > 0) == (stats.steps > 0)
    assert [s.steps > 0 for s in per_sequence] == [True, True, True, False]
    total = out.stats
    assert total.new_tokens == sum(map(len, out.token_ids))
    assert total.steps == sum(s.steps for s in per_sequence)
    assert total.tokens_per_step == sum(s.accepted for s in per_sequence) / total.steps
    assert total.decode_seconds == max(s.decode_seconds for s in per_sequence)
    assert total.tokens_per_second == (total.new_tokens - 4) / total.decode_seconds


def test_statistics_of_plain_decoding_and_of_one_prompt():
    out = counting().generate("a", 21, medusa=False)
    assert (out.stats.steps, out.stats.tokens_per_step, out.stats.new_tokens) == (20, 1.0, 21)
    assert out.stats.tokens_per_second == 20 / out.stats.decode_seconds
    assert out.stats.per_sequence == []
    out = counting().generate("a", 21)
    assert (out.stats.steps, out.stats.tokens_per_step) == (5, 4.0)
    many = counting().generate(["a"], 21)
    assert (many.stats.steps, len(many.stats.per_sequence)) == (5, 1)
    out = counting().generate("a", 1)
    assert (out.stats.steps, out.stats.tokens_per_step, out.stats.tokens_per_second) == (0, 1.0, 0.0)
    assert Stats().tokens_per_second == 0.0


LETTERS = st.sampled_from(["a", "b", "c", " stop", *SPOKEN[28:34]])
PIECES = st.lists(LETTERS | st.just("<eos>"), max_size=12)


@given(
    pieces=PIECES,
    stops=st.lists(st.text("abc stopé", min_size=1, max_size=4), max_size=3),
    limit=st.integers(1, 12),
    cuts=st.lists(st.integers(0, 12), max_size=5),
)
def test_a_transcript_is_what_its_tokens_say(pieces, stops, limit, cuts):
    """Against a rereading of the whole text at every token, however the tokens are dealt out to steps."""
    ids = [token(p) for p in pieces]
    tokenizer = _tokenizer()
    expected_text, reason, taken = "", None, []
    for i in ids:
        taken.append(i)
        ended = "eos" if i == EOS else "length" if len(taken) == limit else None
        text = tokenizer.decode(taken)
        # An unfinished character may still become one, unless the text ends here.
        settled = text if ended else text.rstrip("�") if text.endswith("�") else text
        found = [at for s in stops if (at := settled.find(s)) >= 0]
        expected_text, reason = settled, "stop" if found else ended
        if found:
            expected_text = settled[: min(found)]
        if reason:
            break
    transcript = Transcript(tokenizer, eos_token_ids=(EOS,), stop=stops, max_new_tokens=limit)
    borders = [0, *sorted(c for c in cuts if c < len(ids)), len(ids)]
    shown = ""
    for start, end in itertools.pairwise(borders):
        if transcript.finish_reason is None:
            shown += transcript.push(ids[start:end])
            assert transcript.text.startswith(shown)
    assert transcript.token_ids == taken
    assert transcript.finish_reason == reason
    if reason:
        assert shown == transcript.text == expected_text


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(counting_folder())


@cache
def byte_fallback() -> Tokenizer:
    """As Llama 2's and Mistral's: what has no piece of its own is spelled in bytes."""
    pieces = {"<unk>": 0, **{f"<0x{i:02X}>": i + 1 for i in range(256)}, "\u2581a": 257, "b": 258}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True))
    replaced, strip = decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([replaced, decoders.ByteFallback(), decoders.Fuse(), strip])
    return Tokenizer(backend, {}, None)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    ("said", "stop", "kept", "text", "reason"),
    [
        ("ab\nb", "\n", 3, "ab", "stop"),
        ("ab\n", "\n", 3, "ab", "stop"),  # nor does the end come first
        ("a\né", "\n", 2, "a", "stop"),
        ("abéb", "é", 4, "ab", "stop"),  # with the second of its bytes
        ("abéb", "bé", 4, "a", "stop"),
        ("a\n\nb", "\n\n", 3, "a", "stop"),
        ("a\nb", "\n\n", 3, "a\nb", "length"),
    ],
)
def test_a_stop_string_spelled_in_bytes(said, stop, kept, text, reason, together):
    ids = [{"a": 257, "b": 258}.get(chr(byte), byte + 1) for byte in said.encode()]
    transcript = Transcript(byte_fallback(), eos_token_ids=(), stop=[stop], max_new_tokens=len(ids))
    parts = [ids] if together else [[i] for i in ids]
    shown = [transcript.push(part) for part in parts if not transcript.finish_reason]
    assert (transcript.token_ids, transcript.text, transcript.finish_reason) == (ids[:kept], text, reason)
    assert "".join(shown) == text
