"""How long the rest takes, for people."""


def time_left(seconds: float | None) -> str:
    """``about 9 min left``; nothing where that is not known or nothing is left."""
    if not seconds:
        return ""
    if seconds < 60:
        return "less than a minute left"
    if seconds < 3600:
        return f"about {seconds / 60:.0f} min left"
    return f"about {seconds / 3600:.1f} h left"
