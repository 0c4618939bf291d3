"""Bytes in, arrays out: requests, prompts, tokens, pictures, video, audio and position ids. No torch here."""
