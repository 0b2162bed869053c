"""EC2 as LocalStack serves it, with VM Import, images, instances and volumes that have a content.

An operation that is not here is LocalStack's own. One that ends with `raise NotImplementedError` is, too: LocalStack
hands it on to moto, after what was done here.
"""

from collections.abc import Mapping
from typing import Any

from localstack.aws.api import RequestContext, handler
from localstack.services.ec2.provider import Ec2Provider
from localstack.services.moto import call_moto, call_moto_with_request

from drsync_localstack import images, instances
from drsync_localstack.catalog import Place, Snapshot
from drsync_localstack.ec2_snapshots import announce, backend_of, refresh
from drsync_localstack.import_tasks import ImportTasks, Surroundings, Task
from drsync_localstack.lab import Lab
from drsync_localstack.refusal import Refused
from drsync_localstack.s3_object import has_role, open_object
from drsync_localstack.translate import served

IMAGE_ATTRIBUTES = {
    "bootMode": ("BootMode", "boot_mode"),
    "uefiData": ("UefiData", "uefi_data"),
    "tpmSupport": ("TpmSupport", "tpm_support"),
    "imdsSupport": ("ImdsSupport", "imds_support"),
}


class DrsyncEc2Provider(Ec2Provider):
    """LocalStack's EC2, and what it lacks for recovery."""

    def __init__(self, lab: Lab) -> None:
        super().__init__()
        self.faults = lab.faults
        self.catalog = lab.catalog
        self.launches = instances.Launches()
        around = Surroundings(
            open_object=open_object,
            has_role=has_role,
            announce=lambda _place, snapshot: announce(self.catalog, snapshot),
            retire=_retire,
            register=self._register,
        )
        self.tasks = ImportTasks(lab.catalog, lab.faults, around, lab.clock.now)

    # --- VM Import ---------------------------------------------------------------------------------------------------

    @handler("ImportSnapshot", expand=False)
    @served
    def import_snapshot(self, context: RequestContext, request: Any) -> Any:
        return _snapshot_task(self.tasks.import_snapshot(_place(context), request))

    @handler("ImportImage", expand=False)
    @served
    def import_image(self, context: RequestContext, request: Any) -> Any:
        return _image_task(self.tasks.import_image(_place(context), request))

    @handler("DescribeImportSnapshotTasks", expand=False)
    @served
    def describe_import_snapshot_tasks(self, context: RequestContext, request: Any) -> Any:
        return {"ImportSnapshotTasks": [_snapshot_task(task) for task in self._tasks(context, request, "import-snap-")]}

    @handler("DescribeImportImageTasks", expand=False)
    @served
    def describe_import_image_tasks(self, context: RequestContext, request: Any) -> Any:
        return {"ImportImageTasks": [_image_task(task) for task in self._tasks(context, request, "import-ami-")]}

    @handler("CancelImportTask", expand=False)
    @served
    def cancel_import_task(self, context: RequestContext, request: Any) -> Any:
        before, now = self.tasks.cancel(_place(context), request["ImportTaskId"])
        return {"ImportTaskId": request["ImportTaskId"], "PreviousState": before.value, "State": now.value}

    def _tasks(self, context: RequestContext, request: Any, prefix: str) -> list[Task]:
        filters = request.get("Filters") or ()
        states = [value for one in filters if one["Name"] == "task-state" for value in one["Values"]]
        return self.tasks.listed(_place(context), prefix, request.get("ImportTaskIds") or [], states)

    # --- Snapshots and volumes ---------------------------------------------------------------------------------------

    @handler("DescribeSnapshots", expand=False)
    @served
    def describe_snapshots(self, context: RequestContext, request: Any) -> Any:
        refresh(self.catalog, _place(context))
        for snapshot_id in request.get("SnapshotIds") or ():
            if self.catalog.is_hidden(snapshot_id):
                self.faults.note("visibility_delay_s")
                raise Refused("InvalidSnapshot.NotFound", f"The snapshot '{snapshot_id}' does not exist.")
        answer = call_moto(context)
        answer["Snapshots"] = [one for one in answer["Snapshots"] if not self.catalog.is_hidden(one["SnapshotId"])]
        return answer

    @handler("CreateSnapshot", expand=False)
    @served
    def create_snapshot(self, context: RequestContext, request: Any) -> Any:
        answer = call_moto(context)
        self._keep_volumes_content(context, answer["SnapshotId"])
        return answer

    @handler("CreateSnapshots", expand=False)
    @served
    def create_snapshots(self, context: RequestContext, request: Any) -> Any:
        answer = call_moto(context)
        instance = request.get("InstanceSpecification") or {}
        excluded = instance.get("ExcludeDataVolumeIds") or ()  # which moto passes over
        for snapshot in answer["Snapshots"]:
            if snapshot["VolumeId"] in excluded:
                backend_of(_place(context)).delete_snapshot(snapshot["SnapshotId"])
            else:
                self._keep_volumes_content(context, snapshot["SnapshotId"])
        answer["Snapshots"] = [one for one in answer["Snapshots"] if one["VolumeId"] not in excluded]
        return answer

    @handler("DeleteSnapshot", expand=False)
    @served
    def delete_snapshot(self, context: RequestContext, request: Any) -> Any:
        snapshot_id = request["SnapshotId"]
        for image in backend_of(_place(context)).amis.values():
            if isinstance(image, images.RegisteredImage) and snapshot_id in image.snapshot_ids:
                raise Refused("InvalidSnapshot.InUse", f"The snapshot {snapshot_id} is currently in use by {image.id}")
        answer = call_moto(context)
        self.catalog.delete(snapshot_id)
        return answer

    @handler("CreateVolume", expand=False)
    @served
    def create_volume(self, context: RequestContext, request: Any) -> Any:
        refresh(self.catalog, _place(context))
        snapshot_id = request.get("SnapshotId")
        if snapshot_id:
            mapping = {"SnapshotId": snapshot_id, "VolumeSize": request.get("Size")}
            instances.check_volume(backend_of(_place(context)), "the volume", mapping)
        answer = call_moto(context)
        self.catalog.volume(answer["VolumeId"], snapshot_id)
        return answer

    @handler("DeleteVolume", expand=False)
    @served
    def delete_volume(self, context: RequestContext, request: Any) -> Any:
        answer = call_moto(context)
        self.catalog.forget_volume(request["VolumeId"])
        return answer

    @handler("DescribeVolumes", expand=False)
    @served
    def describe_volumes(self, context: RequestContext, request: Any) -> Any:
        answer = call_moto(context)
        for volume in answer["Volumes"]:
            for attachment in volume.get("Attachments") or ():  # moto always says false
                instance = backend_of(_place(context)).get_instance(attachment["InstanceId"])
                device = instance.block_device_mapping.get(attachment["Device"])
                attachment["DeleteOnTermination"] = bool(device and device.delete_on_termination)
        return answer

    def _keep_volumes_content(self, context: RequestContext, snapshot_id: str) -> None:
        volume = backend_of(_place(context)).snapshots[snapshot_id].volume
        self.catalog.add_of_volume(_place(context), snapshot_id, volume.id, volume.snapshot_id, volume.size)

    @handler("CreateTags", expand=False)
    @served
    def create_tags(self, context: RequestContext, request: Any) -> Any:
        call_moto(context)

    # --- Images ------------------------------------------------------------------------------------------------------

    def _register(self, place: Place, request: Mapping[str, Any]) -> str:
        refresh(self.catalog, place)
        return str(images.register(backend_of(place), request).id)

    @handler("RegisterImage", expand=False)
    @served
    def register_image(self, context: RequestContext, request: Any) -> Any:
        return {"ImageId": self._register(_place(context), request)}

    @handler("DescribeImageAttribute", expand=False)
    @served
    def describe_image_attribute(self, context: RequestContext, request: Any) -> Any:
        image = backend_of(_place(context)).amis.get(request["ImageId"])
        if request["Attribute"] not in IMAGE_ATTRIBUTES or not isinstance(image, images.RegisteredImage):
            raise NotImplementedError
        member, attribute = IMAGE_ATTRIBUTES[request["Attribute"]]
        value = getattr(image, attribute)
        return {"ImageId": image.id, member: {"Value": value} if value else {}}

    # --- Instances ---------------------------------------------------------------------------------------------------

    @handler("RunInstances", expand=False)
    @served
    def run_instances(self, context: RequestContext, request: Any) -> Any:
        place = _place(context)
        key = (place.account, place.region, request.get("ClientToken") or "")
        answer, _ = self.launches.once(key, request, lambda: self._launch(context, request))
        return answer

    @handler("TerminateInstances", expand=False)
    @served
    def terminate_instances(self, context: RequestContext, request: Any) -> Any:
        backend = backend_of(_place(context))
        before = set(backend.volumes)
        answer = call_moto(context)
        for volume_id in before - set(backend.volumes):
            self.catalog.forget_volume(volume_id)
        return answer

    @handler("GetInstanceUefiData", expand=False)
    @served
    def get_instance_uefi_data(self, context: RequestContext, request: Any) -> Any:
        instance = backend_of(_place(context)).get_instance(request["InstanceId"])
        if getattr(instance, "current_instance_boot_mode", "legacy-bios") != "uefi":
            raise Refused("UnsupportedOperation", f"The instance {instance.id} does not boot by UEFI.")
        return {"InstanceId": instance.id, "UefiData": instance.uefi_data or ""}

    @handler("ModifyInstanceAttribute", expand=False)
    @served
    def modify_instance_attribute(self, context: RequestContext, request: Any) -> Any:
        if "EnaSupport" not in request:
            raise NotImplementedError
        instance = backend_of(_place(context)).get_instance(request["InstanceId"])
        if instance.state != "stopped":
            raise Refused("IncorrectInstanceState", f"The instance {instance.id} is not in the 'stopped' state.")
        instance.ena_support = bool(request["EnaSupport"].get("Value"))
        return None

    def _launch(self, context: RequestContext, request: Any) -> Any:
        place = _place(context)
        refresh(self.catalog, place)
        backend = backend_of(place)
        image = instances.check(backend, request)
        mappings = instances.mappings_for(backend, image, request)
        bare: Any = {name: value for name, value in request.items() if name != "BlockDeviceMappings"}
        answer = call_moto_with_request(context, bare)
        for shown in answer["Instances"]:
            instance = backend.get_instance(shown["InstanceId"])
            instances.finish(backend, self.catalog, instance, image, mappings, request)
            shown.update(State={"Code": 0, "Name": "pending"}, BlockDeviceMappings=[])  # as AWS says at first
            for member, attribute in (("BootMode", "boot_mode"), ("TpmSupport", "tpm_support")):
                if value := getattr(instance, attribute, None):
                    shown[member] = value
        return answer


def _place(context: RequestContext) -> Place:
    return Place(context.account_id, context.region)


def _retire(place: Place, snapshot: Snapshot) -> None:
    backend_of(place).snapshots.pop(snapshot.id, None)


def _snapshot_task(task: Task) -> dict[str, Any]:
    request: Mapping[str, Any] = task.request
    detail = {**task.disks[0], "Status": task.status.value, "Encrypted": bool(request.get("Encrypted"))}
    detail.update(_told(task))
    if request.get("KmsKeyId"):
        detail["KmsKeyId"] = request["KmsKeyId"]
    shown: dict[str, Any] = {"ImportTaskId": task.id, "SnapshotTaskDetail": detail, "Tags": task.tags}
    if request.get("Description"):
        shown["Description"] = request["Description"]
    return shown


def _image_task(task: Task) -> dict[str, Any]:
    request: Mapping[str, Any] = task.request
    kept = ("Description", "BootMode", "LicenseType", "UsageOperation", "KmsKeyId", "Hypervisor")
    shown: dict[str, Any] = {name: request[name] for name in kept if request.get(name)}
    shown.update(
        ImportTaskId=task.id,
        Architecture=request.get("Architecture") or "x86_64",
        Platform=request.get("Platform") or "Linux",
        Encrypted=bool(request.get("Encrypted")),
        Status=task.status.value,
        SnapshotDetails=[dict(disk) for disk in task.disks],
        Tags=task.tags,
        **_told(task),
    )
    if task.image_id:
        shown["ImageId"] = task.image_id
    return shown


def _told(task: Task) -> dict[str, str]:
    """Progress and message, which a task that has ended well no longer has."""
    told = {"StatusMessage": task.message} if task.message else {}
    return {**told, "Progress": str(task.progress)} if task.status.value == "active" else told
