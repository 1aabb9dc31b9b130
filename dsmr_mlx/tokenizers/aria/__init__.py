"""Aria's vocabularies (EleutherAI/aria, 2025): notes with absolute onsets in segments of five seconds."""
