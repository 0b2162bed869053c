"""From a request to a plan; collects what would refuse it instead of stopping at the first. Makes nothing."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from drsync.errors import CantRunInCloud, DrsyncError, FixUnavailable, ObjectDamaged, WontBoot
from drsync.finding import Finding
from drsync.format.names import segment as segment_name
from drsync.preflight.findings import Verdict
from drsync.preflight.fix.prepare import check_available
from drsync.preflighting import Preflighting
from drsync.recovery.cloud.cost import cost_of
from drsync.recovery.cloud.disks import DiskShipping, PlannedDisk
from drsync.recovery.cloud.fixing import WORK_DIR
from drsync.recovery.cloud.guest import UEFI, Guest, read_guest
from drsync.recovery.cloud.request import CloudPlan, CloudRequest, Via
from drsync.session import Session
from drsync.target.domain import tree
from drsync.target.domain.values import ANY_NETWORK, Notes
from drsync.target.ec2 import network, sizing, tags
from drsync.target.ec2.aws import Aws
from drsync.target.ec2.images import MAX_VOLUMES
from drsync.target.ec2.instances import Instance, Instances
from drsync.target.ec2.sizing import ARM_FAMILIES, FAMILIES, InstanceType, Need
from drsync.target.ec2.snapshot import BLOCK_BYTES, MAX_VOLUME_GIB, volume_gib
from drsync.target.ec2.uefi import NotConverted, uefi_data
from drsync.target.ec2.upload import MAX_DISK_BYTES

_MBR_LIMIT_GIB: Final = 2048
"""A boot disk with an MBR can't be larger (EC2 user guide, "Constraints on EBS volumes")."""


class CloudPlanning:
    """One run of `CloudRecovery.plan`."""

    def __init__(self, session: Session, aws: Aws, shipping: DiskShipping, request: CloudRequest) -> None:
        """Find the point.

        Raises:
            UnknownVm, UnknownPoint, PointLost, IntegrityError, StoreError: there is no such point.
            CloudMisconfigured: no region is chosen.
        """
        self._session = session
        self._aws = aws
        self._region = aws.region
        self._shipping = shipping
        self._request = request
        self._point, self._image = Finding(session).find_point(request.vm, number=request.number, at=request.at)
        self._of = shipping.of(self._point)
        self._errors: list[DrsyncError] = []
        self._notes = Notes()
        self._guest = self._read_guest()
        self._boot_mode = request.boot_mode or self._guest.boot_mode
        self._subnet = request.subnet or self._mapped_subnet()
        self._uefi_data: str | None = None
        self._tpm = self._guest.has_tpm and self._boot_mode == UEFI

    def _mapped_subnet(self) -> str | None:
        """The subnet of the network that the VM's first interface was in."""
        first = next(iter(self._guest.networks), "")
        return self._request.networks.get(first) or self._request.networks.get(ANY_NETWORK)

    def plan(self) -> CloudPlan:
        if self._request.via is Via.VM_IMPORT and self._request.import_bucket is None:
            self._cant("VM Import reads images from a bucket: choose it with --bucket")
        if self._request.fix_guest and (self._request.convert_guest or self._request.via is Via.VM_IMPORT):
            self._cant("a guest that AWS converts or imports is not prepared by drsync: leave --fix-guest out")
        disks = self._disks()
        zone, private_ip = self._network()
        self._uefi_data = self._converted_nvram()
        self._note_guest()
        instance_type = self._instance_type(zone, len(disks))
        existing = self._existing()
        if existing is None and not self._request.skip_preflight:
            self._preflight()
        self._check_address(private_ip, existing)
        return CloudPlan(
            request=self._request,
            region=self._region,
            point=self._point,
            of=self._of,
            guest=self._guest,
            boot_mode=self._boot_mode,
            tpm=self._tpm,
            uefi_data=self._uefi_data,
            disks=disks,
            instance_type=instance_type,
            zone=zone,
            subnet=self._subnet,
            private_ip=private_ip,
            existing=existing,
            notes=tuple(self._notes.all),
            errors=tuple(self._errors),
            cost=cost_of(
                put_blocks=sum(disk.put_blocks for disk in disks) if self._request.via is Via.EBS else 0,
                block_bytes=BLOCK_BYTES,
                volume_gib=sum(disk.volume_gib for disk in disks),
            ),
        )

    def _preflight(self) -> None:
        """What can be seen of it beforehand: a guest that would not boot is refused, unless it will be changed."""
        report = Preflighting(self._session).preflighted(self._point)
        counts = report.counts
        if self._request.fix_guest:
            with_fix = "; the guest is prepared for EC2 on the way" if counts[Verdict.FAILS] else ""
            self._check_fix()
        else:
            with_fix = "; AWS converts the guest" if self._request.convert_guest else ""
        failed = [f"{one.check}: {one.reason}" for one in report.findings if one.verdict is Verdict.FAILS]
        if failed and not with_fix:
            problems = "; ".join(failed)
            self._errors.append(WontBoot(vm=self._request.vm, point=self._point.number, problems=problems))
        elif failed:
            self._notes.changed("preflight", f"as it is, it would not come up: {'; '.join(failed)}{with_fix}")
        if doubtful := counts[Verdict.WARNING] + counts[Verdict.UNKNOWN]:
            text = f"{doubtful} warnings or unknowns (drsync preflight {self._request.vm} --to ec2 lists them)"
            self._notes.changed("preflight", text)

    def _check_fix(self) -> None:
        try:
            check_available(self._request.work_dir or WORK_DIR)
        except FixUnavailable as err:
            self._errors.append(err)

    def _cant(self, problem: str) -> None:
        self._errors.append(CantRunInCloud(vm=self._request.vm, region=self._region, problem=problem))

    def _read_guest(self) -> Guest:
        names = [disk.name for disk in self._point.disks]
        try:
            return read_guest(self._image.point.definition, self._request.vm, names)
        except tree.NotReadable as err:  # it is authenticated, and yet not what drsync writes
            key = segment_name(self._request.vm, self._point.number)
            raise ObjectDamaged(key=key, problem=f"its definition {err}") from err

    def _disks(self) -> Sequence[PlannedDisk]:
        names = self._guest.disks
        if len(names) > MAX_VOLUMES:
            self._cant(f"it has {len(names)} disks; an instance takes {MAX_VOLUMES} volumes")
            return ()
        disks = self._shipping.plan(self._point, self._image, names, whole=self._request.via is Via.VM_IMPORT)
        if self._request.fix_guest and not all(disk.existing for disk in disks):
            disks = [replace(disk, existing=None) for disk in disks]  # they are of one preparation, or of none
        for disk in disks:
            if self._request.via is Via.VM_IMPORT and disk.size_bytes >= MAX_DISK_BYTES:
                self._cant(f"disk {disk.name} has {disk.volume_gib} GiB; VM Import takes images below 16 TiB")
            if disk.volume_gib > MAX_VOLUME_GIB:
                self._cant(f"disk {disk.name} has {disk.volume_gib} GiB; a volume has at most {MAX_VOLUME_GIB}")
        return disks

    def _network(self) -> tuple[str | None, str | None]:
        """Zone and address of the instance, as far as they are chosen."""
        request, vpc_id, zone = self._request, None, None
        found = network.subnet(self._aws, self._subnet) if self._subnet is not None else None
        if self._subnet is not None and found is None:
            self._cant(f"there is no subnet {self._subnet}")
        elif self._subnet is None and not network.has_default_vpc(self._aws):
            self._cant("the region has no default VPC: choose a subnet with --subnet")
        if found is not None:
            vpc_id, zone = found.vpc_id, found.zone
            if not found.free_addresses:
                self._cant(f"subnet {found.id} has no free address")
        for problem in network.unknown_groups(self._aws, request.security_groups, vpc_id):
            self._cant(problem)
        if not request.security_groups:
            self._notes.changed(
                "network", "it gets the VPC's default security group, which lets nobody in from outside"
            )
        return zone, self._private_ip(found)

    def _private_ip(self, found: network.Subnet | None) -> str | None:
        wanted = self._request.private_ip
        if self._request.keep_ip:
            if not self._guest.addresses:
                self._cant("the point does not tell which address it had: give it with --private-ip")
                return None
            wanted = self._guest.addresses[0]
            if found is not None:
                fitting = [a for a in self._guest.addresses if not found.problem_with(a)]
                wanted = fitting[0] if fitting else wanted
        if wanted is None:
            return None
        if found is None:
            if self._subnet is None:
                self._cant(f"address {wanted} needs a subnet that has it: choose it with --subnet")
        elif problem := found.problem_with(wanted):
            self._cant(problem)
        return wanted

    def _check_address(self, private_ip: str | None, existing: Instance | None) -> None:
        if private_ip is None or self._subnet is None:
            return
        owner = network.owner_of(self._aws, private_ip, self._subnet)
        if owner and (existing is None or owner != existing.id):
            self._cant(f"address {private_ip} is in use by {owner}")

    def _instance_type(self, zone: str | None, volumes: int) -> InstanceType | None:
        if not self._guest.is_known_architecture:
            self._cant(f"EC2 has no machines for {self._guest.architecture} guests")
            return None
        need = Need(
            vcpus=self._guest.vcpus,
            memory_mib=self._guest.memory_mib,
            architecture=self._guest.architecture,
            boot_mode=self._boot_mode,
            tpm=self._tpm,
            volumes=volumes,
        )
        return self._chosen(need, zone) if self._request.instance_type is None else self._named(need, zone)

    def _chosen(self, need: Need, zone: str | None) -> InstanceType | None:
        families = self._request.families
        if need.architecture == "arm64" and tuple(families) == FAMILIES:
            families = ARM_FAMILIES
        types = sizing.types_of(self._aws, families)
        if zone is not None:
            offered = sizing.offered_in(self._aws, zone)
            types = [t for t in types if t.name in offered]
        chosen = sizing.choose(types, need, families)
        if chosen is None:
            what = f"{need.vcpus} vCPUs, {need.memory_mib} MiB, {need.boot_mode}"
            what += ", a TPM" * need.tpm
            self._cant(f"no type of {', '.join(families)} has {what} in {zone or self._region}: choose --instance-type")
        return chosen

    def _named(self, need: Need, zone: str | None) -> InstanceType | None:
        name = self._request.instance_type or ""
        found = sizing.type_named(self._aws, name)
        if found is None:
            self._cant(f"{self._region} has no instance type {name}")
            return None
        if zone is not None and name not in sizing.offered_in(self._aws, zone):
            self._cant(f"{zone} has no instance type {name}")
        if lacks := found.lacks(need, size_too=False):
            self._cant(f"instance type {name} {lacks}")
        elif lacks := found.lacks(need):
            self._notes.changed("size", f"{name} {lacks}; the VM had {need.vcpus} vCPUs and {need.memory_mib} MiB")
        return found

    def _existing(self) -> Instance | None:
        wanted = {**self._of.identity(), tags.NAME: self._request.instance_name}
        return next(iter(Instances(self._aws, self._session.clock).find(wanted)), None)

    def _converted_nvram(self) -> str | None:
        """The NVRAM as EC2 takes it; else the guest boots from its fallback path, which is said."""
        if self._boot_mode != UEFI:
            return None
        why = "the point has none"
        if self._guest.nvram is not None:
            try:
                data = uefi_data(self._guest.nvram)
            except NotConverted as err:
                why = str(err)
            else:
                self._notes.changed("nvram", "its variables come along; boot entries by device path are passed over")
                return data
        self._notes.lost("nvram", f"it boots EFI/BOOT/BOOTX64.EFI of its first disk; {why}")
        return None

    def _note_guest(self) -> None:
        guest = self._guest
        self._notes.changed(
            "disks", "they appear as NVMe devices, in any order: the guest must find them by UUID or LVM"
        )
        if not guest.is_libvirt and self._request.boot_mode is None:
            self._notes.changed(
                "boot", "the point does not tell whether it boots by UEFI: BIOS is assumed; see --boot-mode"
            )
        if guest.secure_boot and self._uefi_data is None:
            self._notes.lost("secure boot", "its keys are in the NVRAM; the instance boots without it")
        if guest.has_tpm:
            text = "the instance has an empty NitroTPM" if self._tpm else "EC2 has none for guests that boot by BIOS"
            self._notes.lost("tpm", f"{text}; what was sealed to the old one needs its recovery keys")
        if guest.interfaces > 1:
            self._notes.lost("network", f"it had {guest.interfaces} interfaces; the instance gets one")
        if guest.may_be_windows and not self._request.convert_guest:
            self._notes.changed("licence", "for Windows, AWS bills licences by the image: use --convert-guest")
        root_gib = volume_gib(self._image.disk(guest.disks[0]).size_bytes) if guest.disks else 0
        if root_gib > _MBR_LIMIT_GIB and self._boot_mode != UEFI:
            self._notes.changed("boot", f"the first disk has {root_gib} GiB: by BIOS it boots only with a GPT")
