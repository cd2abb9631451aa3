"""The thin async client of E2B's wire protocol."""
