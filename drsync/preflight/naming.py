"""Which volume a source of fstab's means. Pure; both sides of the fence ask."""

from drsync.preflight.facts import Volume


def names_volume(source: str, volume: Volume) -> bool:
    """Whether a source of fstab's means a volume."""
    key, equals, value = source.partition("=")
    if equals:
        told = {"UUID": volume.uuid, "LABEL": volume.label, "PARTUUID": volume.partuuid, "PARTLABEL": volume.partlabel}
        known = told.get(key.upper(), "")
        return bool(known) and known.lower() == value.strip("\"'").lower()
    for directory, known in (("by-uuid", volume.uuid), ("by-label", volume.label), ("by-partuuid", volume.partuuid)):
        if source.startswith(f"/dev/disk/{directory}/"):
            return bool(known) and known.lower() == source.rpartition("/")[2].lower()
    if not volume.disk:
        return source in {f"/dev/{volume.name}", f"/dev/mapper/{mapper_name(volume.name)}"}
    return source == f"/dev/{volume.name}"


def mapper_name(volume: str) -> str:
    """What device-mapper calls a logical volume: `my-vg/root` is my--vg-root."""
    return "-".join(part.replace("-", "--") for part in volume.split("/"))
