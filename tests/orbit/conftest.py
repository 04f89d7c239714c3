from datetime import UTC, datetime

import pytest


@pytest.fixture(scope="session")
def epoch() -> datetime:
    return datetime(2026, 3, 1, tzinfo=UTC)
