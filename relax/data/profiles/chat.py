"""Conversations as the data has them: the default."""

from relax.data.profiles.base import Rewriting


class ChatProfile(Rewriting):
    """Adds nothing and changes nothing, in rows of any format."""

    columns = ()

    def get_stop_sequences(self) -> list[str]:
        return []
