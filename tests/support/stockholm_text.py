"""Stockholm text of an alignment, to check that `data.stockholm.read` loses nothing."""

from data.stockholm import Alignment


def written(alignment: Alignment) -> bytes:
    """Return one record with unwrapped rows."""
    lines = ["# STOCKHOLM 1.0", *alignment.comments]
    lines += [f"#=GF {feature} {text}" for feature, text in alignment.gf]
    lines += [f"#=GS {name} {feature} {text}" for name, feature, text in alignment.gs]
    for name, row in zip(alignment.ids, alignment.rows, strict=True):
        lines.append(f"{name} {row.tobytes().decode('latin-1')}")
        lines += [f"#=GR {name} {feature} {text}" for (owner, feature), text in alignment.gr.items() if owner == name]
    lines += [f"#=GC {feature} {text}" for feature, text in alignment.gc.items()]
    return "\n".join([*lines, "//", ""]).encode("latin-1")
