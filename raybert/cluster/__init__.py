"""Connecting to Ray: sessions, tokens, and what is private in Ray."""
