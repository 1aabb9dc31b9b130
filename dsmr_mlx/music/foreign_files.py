"""Recognize files of other formats that have a MIDI file's name."""

GIT_LFS = b"version https://git-lfs.github.com/spec/"
GIT_ANNEX = b"/annex/objects/"

# Offset, bytes, description.
SIGNATURES = (
    (0, GIT_LFS, "a Git LFS pointer in place of the file; `git lfs pull` in its repository fetches the file"),
    (0, GIT_ANNEX, "a git-annex pointer in place of the file; `git annex get` in its repository fetches the file"),
    (0, b"PK\3\4", "a ZIP archive; unpack it first"),
    (0, b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (0, b"BZh", "compressed with bzip2; unpack it first"),
    (0, b"\xfd7zXZ\0", "compressed with xz; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with Zstandard; unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive; unpack it first"),
    (0, b"Rar!", "a RAR archive; unpack it first"),
    (257, b"ustar", "a tar archive; unpack it first"),
    (8, b"WAVE", "WAV audio; audio is not MIDI"),
    (8, b"AIFF", "AIFF audio; audio is not MIDI"),
    (8, b"AIFC", "AIFF audio; audio is not MIDI"),
    (0, b"fLaC", "FLAC audio; audio is not MIDI"),
    (0, b"OggS", "Ogg audio; audio is not MIDI"),
    (0, b"ID3", "MP3 audio; audio is not MIDI"),
    (0, b"\xff\xfb", "MP3 audio; audio is not MIDI"),
    (0, b"\xff\xf3", "MP3 audio; audio is not MIDI"),
    (4, b"ftyp", "MP4 audio or video; audio is not MIDI"),
    (0, b"%PDF", "a PDF"),
    (0, b"XMF_", "an XMF container"),
)
PAGES = (b"<!doctype html", b"<html")
SCORES = (b"<?xml", b"<score-partwise", b"<score-timewise")


def recognize_foreign_file(data: bytes) -> str | None:
    """Return what kind of file begins with these bytes, and what to do about it; None if unknown."""
    if not data:
        return "it is empty"
    for at, signature, meaning in SIGNATURES:
        if data[at : at + len(signature)] == signature:
            return f"it is {meaning}"
    text = data[:100].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(PAGES):
        return "it is a web page; perhaps a download failed"
    if text.startswith(SCORES):
        return "it is XML, perhaps MusicXML; notation programs export MIDI"
    if not any(data[:4096]):
        return "it holds zeros only; perhaps a download or a copy failed"
    return None
