"""Octets of mail as text: charsets and encoded words.

Owns the choice of a decoder and RFC 2047. Knows no message and no header name. Nothing here
raises for what it is given, and each step is linear in it. Names of charsets come from mail:
only a fixed table is consulted, never the codec registry (which remembers every miss, and
holds decoders that are no charsets).

What cannot be decoded stays as it was, and a ``Problems`` list says so. A decoded CR, LF or
NUL is a character like others: whoever writes the text elsewhere escapes it.

RFC 2045 §5.2 (us-ascii by default), RFC 2047, RFC 2231 §5 (language in encoded words),
RFC 6532 (UTF-8 in header fields).
"""

from __future__ import annotations

import binascii
import encodings.aliases
import re
from itertools import islice
from typing import Final

from mypy_extensions import mypyc_attr

#: Problems told of one message, and characters of each.
PROBLEMS, PROBLEM_LENGTH = 50, 200
#: Encoded words of one text.
WORD_LIMIT: Final = 10_000
#: Broken escapes after which quoted-printable is taken to be something else.
BROKEN_ESCAPES: Final = 1000

_REFUSED = {"idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined", "unicode_internal", "mbcs", "oem", "rot_13"}
_REFUSED |= {"base64_codec", "bz2_codec", "hex_codec", "quopri_codec", "uu_codec", "zlib_codec"}
_CODECS = {name: codec for name, codec in encodings.aliases.aliases.items() if codec not in _REFUSED}
_CODECS |= {codec: codec for codec in _CODECS.values()}
_CODECS |= {
    "koi8_u": "koi8_u",
    "koi8_t": "koi8_t",
    "cp720": "cp720",
    "cp737": "cp737",
    "cp874": "cp874",
    "windows_874": "cp874",
    "utf_8_sig": "utf_8_sig",
    "unicode_1_1_utf_7": "utf_7",
    "unicode_1_1_utf_8": "utf_8",
    "ansi_x3.4": "ascii",
    "iso_8859_6_i": "iso8859_6",
    "iso_8859_6_e": "iso8859_6",
    "iso_8859_8_i": "iso8859_8",
    "iso_8859_8_e": "iso8859_8",
    "x_sjis": "cp932",
    "windows_31j": "cp932",
    "x_gbk": "gb18030",
    "ks_c_5601": "euc_kr",
    "x_windows_949": "cp949",
    "x_euc_jp": "euc_jp",
    "x_mac_roman": "mac_roman",
    "x_mac_cyrillic": "mac_cyrillic",
    "x_user_defined": "latin_1",
}
#: What is tried where the declared charset does not fit: its superset of daily use.
_WIDER = {
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "euc_kr": "cp949",
    "shift_jis": "cp932",
    "big5": "big5hkscs",
    "iso2022_jp": "iso2022_jp_ext",
    "euc_jp": "euc_jis_2004",
}
_SEPARATORS: Final = re.compile(r"[^0-9a-z.]+")
_C1: Final = re.compile(rb"[\x80-\x9f]")
_WORD: Final = re.compile(r"=\?([^?\s*]{1,60})(?:\*[^?\s]{0,40})?\?([bBqQ])\?")
#: An "=" of quoted-printable that is neither an escape nor a soft line break.
_BROKEN: Final = re.compile(rb"=(?![0-9A-Fa-f]{2}|\r?\n|\Z)")
_SPACED_BREAK: Final = re.compile(rb"=[ \t]+(?=\r?\n)")
_NOT_BASE64: Final = bytes(set(range(256)) - set(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="))
#: Octets of base64 that are decoded in one call.
_PIECE: Final = 1 << 20
#: Octets of quoted-printable whose spaced breaks are taken out at a time.
_LINES: Final = 1 << 16


@mypyc_attr(native_class=False)
class Problems(list[str]):
    """What was broken and how it was taken: short, each once, and not without end."""

    def note(self, text: str) -> None:
        if len(self) < PROBLEMS:
            text = text[:PROBLEM_LENGTH]
            if text not in self:
                self.append(text)
        elif len(self) == PROBLEMS:
            self.append("further problems are not told")


def codec_of(charset: str) -> str | None:
    """The decoder for a charset as mail names it; None if we know none."""
    return _CODECS.get(_SEPARATORS.sub("_", charset[:60].lower()).strip("_"))


def text_of(octets: bytes, charset: str | None, problems: Problems, where: str) -> str:
    """``octets`` in the declared charset (None or us-ascii: none was declared)."""
    if octets.isascii() and charset is None:
        return octets.decode("ascii")
    codec = codec_of(charset) if charset else "ascii"
    if codec is None:
        problems.note(f"{where}: unknown charset {charset!r:.80}")
        return _undeclared(octets, problems, where)
    if codec == "ascii":
        return _undeclared(octets, problems, where)
    if codec in ("latin_1", "iso8859_1") and _C1.search(octets):
        # Nobody means C1 controls: it is windows-1252 under a wrong name.
        problems.note(f"{where}: octets 128-159 in {charset}, read as windows-1252")
        return _western(octets)
    for candidate in (codec, _WIDER.get(codec)):
        if candidate is not None:
            try:
                return _whole(octets.decode(candidate))
            except ValueError:
                continue
    try:
        text = octets.decode("utf-8")
    except ValueError:
        problems.note(f"{where}: octets that are not {charset!r:.80}, replaced")
        try:
            return _whole(octets.decode(codec, "replace"))
        except ValueError:
            return _western(octets)
    problems.note(f"{where}: not {charset!r:.80} but UTF-8")
    return text


def _undeclared(octets: bytes, problems: Problems, where: str) -> str:
    if octets.isascii():
        return octets.decode("ascii")
    try:
        text = octets.decode("utf-8")
    except ValueError:
        problems.note(f"{where}: 8-bit octets of no declared charset, read as windows-1252")
        return _western(octets)
    problems.note(f"{where}: 8-bit octets of no declared charset, read as UTF-8")
    return text


def _western(octets: bytes) -> str:
    try:
        return octets.decode("cp1252")
    except ValueError:
        return octets.decode("latin-1")


def _whole(text: str) -> str:
    """Without lone surrogates (UTF-7 and the UTF-16 family can spell them), which no output can hold."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def field_text(octets: bytes, problems: Problems, where: str) -> str:
    """A header field value as text, encoded words not yet decoded (RFC 6532: UTF-8)."""
    if octets.isascii():
        return octets.decode("ascii")
    try:
        return octets.decode("utf-8")
    except ValueError:
        problems.note(f"{where}: octets that are not UTF-8, read as windows-1252")
        return _western(octets)


def decode_words(text: str, problems: Problems, where: str) -> str:
    """``text`` with its encoded words decoded (RFC 2047), wherever they stand.

    White space between two of them is no text (§6.2). Neighbours of one charset are decoded
    as one, because a character is often cut in two between them."""
    at = text.find("=?")
    if at < 0:
        return text
    pieces: list[str] = []
    done = 0  # what comes before this is in `pieces` or in the run
    run = bytearray()
    run_charset, run_start, run_end = "", 0, -1

    def close() -> None:
        nonlocal run_end
        if run_end < 0:
            return
        if codec_of(run_charset) is None:
            problems.note(f"{where}: unknown charset {run_charset!r:.80} in an encoded word")
            pieces.append(text[run_start:run_end])
        else:
            pieces.append(text_of(bytes(run), run_charset, problems, where))
        run.clear()
        run_end = -1

    for _ in range(WORD_LIMIT):
        if at < 0:
            break
        match = _WORD.match(text, at)
        if match is None:
            at = text.find("=?", at + 2)
            continue
        # A word ends before the next one begins: no search looks further than that.
        following = text.find("=?", match.end())
        end = text.find("?=", match.end(), len(text) if following < 0 else following + 1)
        if end < 0 and text.startswith("=?=", following):
            # That was base64's padding and the end of this word.
            end = following + 1
        octets = None if end < 0 else _word_octets(match[2], text[match.end() : end])
        if octets is None:
            problems.note(f"{where}: a broken encoded word, left as it was")
            at = following
            continue
        between = text[done:at]
        adjacent = run_end >= 0 and not between.strip(" \t\r\n")
        if not (adjacent and match[1].lower() == run_charset.lower()):
            close()
            if not adjacent:
                pieces.append(between)
            run_charset, run_start = match[1], at
        run += octets
        done = run_end = end + 2
        at = text.find("=?", done)
    else:
        problems.note(f"{where}: over {WORD_LIMIT} encoded words, the rest is left as it was")
    close()
    pieces.append(text[done:])
    return "".join(pieces)


def _word_octets(encoding: str, payload: str) -> bytes | None:
    octets = payload.encode("utf-8")
    if encoding in "qQ":
        if _SPACED_BREAK.search(octets) or octets.endswith(b"="):
            return None
        fixed = _repaired(octets, None, "")
        return None if fixed is None else binascii.a2b_qp(fixed, header=True)
    silent = Problems()
    decoded = base64_octets(octets, silent, "")
    # Missing padding is common and harmless; anything else is not base64.
    return decoded if all(problem.endswith("ends early") for problem in silent) else None


def _repaired(octets: bytes, problems: Problems | None, where: str) -> bytes | None:
    """Quoted-printable whose stray "=" are escaped; None if there are too many to be that."""
    if _BROKEN.search(octets) is None:
        return octets
    if next(islice(_BROKEN.finditer(octets), BROKEN_ESCAPES, None), None) is not None:
        return None
    if problems is not None:
        problems.note(f"{where}: broken quoted-printable escapes, left as they were")
    return _BROKEN.sub(b"=3D", octets)


def _without_spaced_breaks(octets: bytes) -> bytes:
    """Some lines at a time: the pieces between the breaks are objects, of twenty times their size."""
    made = bytearray()
    at = 0
    while at < len(octets):
        end = octets.find(b"\n", at + _LINES) + 1 or len(octets)
        made += _SPACED_BREAK.sub(b"=", octets[at:end])
        at = end
    return bytes(made)


def quoted_printable_octets(octets: bytes, problems: Problems, where: str) -> bytes:
    """RFC 2045 §6.7. A broken escape stays as it was; octets that are no quoted-printable at all too."""
    if _SPACED_BREAK.search(octets):
        octets = _without_spaced_breaks(octets)
    fixed = _repaired(octets, problems, where)
    if fixed is None:
        problems.note(f"{where}: not quoted-printable, left as it was")
        return octets
    return binascii.a2b_qp(fixed)


def base64_octets(octets: bytes, problems: Problems, where: str, start: int = 0, end: int | None = None) -> bytes:
    """RFC 2045 §6.8. Foreign octets are read over; padding ends it; missing padding is no loss.

    Only what lies between ``start`` and ``end`` counts: large contents are not copied for it."""
    end = len(octets) if end is None else end
    # Nearly all of it is clean: then the lengths fit, and nothing has to be looked over.
    try:
        decoded = _decoded(octets, start, end)
    except ValueError:
        pass
    else:
        line_ends = octets.count(b"\r", start, end) + octets.count(b"\n", start, end)
        pad = octets.find(b"=", start, end)
        if end - start - line_ends == 4 * ((len(decoded) + 2) // 3) and (pad < 0 or pad >= end - 6):
            return decoded
    octets = octets[start:end]
    clean = octets.translate(None, b"\r\n\t ")
    if clean.translate(None, _NOT_BASE64) != clean:
        problems.note(f"{where}: octets that are not base64, read over")
        clean = clean.translate(None, _NOT_BASE64)
    body, padding, rest = clean.partition(b"=")
    if rest.strip(b"="):
        problems.note(f"{where}: base64 goes on after its padding, left out")
    short = len(body) % 4
    pads = len(padding) + len(rest) - len(rest.lstrip(b"="))
    if short == 1 or pads < -len(body) % 4:
        problems.note(f"{where}: base64 ends early")
    body = body[:-1] if short == 1 else body + b"=" * (-len(body) % 4)
    return _decoded(body, 0, len(body))


def _decoded(octets: bytes, start: int, end: int) -> bytes:
    """Base64 in pieces, so that no single call holds up other threads. Raises ValueError where a
    piece is not whole."""
    view = memoryview(octets)
    if end - start <= _PIECE:
        return binascii.a2b_base64(view[start:end])
    pieces: list[bytes] = []
    while start < end:
        cut = start + _PIECE
        if cut < end:
            newline = octets.find(b"\n", cut, min(cut + 1000, end))
            cut = newline + 1 if newline >= 0 else cut
        pieces.append(binascii.a2b_base64(view[start : min(cut, end)]))
        start = cut
    return b"".join(pieces)
