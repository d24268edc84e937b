"""Conversations as the data has them: the default."""

from relax.data.profiles.base import Rewriting


class ChatProfile(Rewriting):
    """Asks for nothing and changes nothing; rows that are no conversations stay what they are."""

    columns = ()

    def get_stop_sequences(self) -> list[str]:
        return []
