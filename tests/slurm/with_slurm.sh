#!/bin/sh
# Run a command beside a Slurm of one node with 2 CPUs and a pretended GPU:
#     unshare --mount --pid --fork --kill-child --mount-proc tests/slurm/with_slurm.sh "FOLDER…" COMMAND…
# All is written to memory, but for the FOLDERs, and ends with the command. Needs root and Debian's packages.
set -eu
folders=$1
shift
if [ "${QWT_SLURM_ROOT:-}" = "" ]; then
    memory=/mnt # of this namespace alone
    mount -t tmpfs -o size=3g tmpfs "$memory"
    mkdir "$memory/upper" "$memory/work" "$memory/root"
    mount -t overlay overlay -o "lowerdir=/,upperdir=$memory/upper,workdir=$memory/work" "$memory/root"
    for folder in /dev /sys $folders; do
        mkdir -p "$memory/root$folder"
        mount --rbind "$folder" "$memory/root$folder"
    done
    mount -t proc proc "$memory/root/proc"
    QWT_SLURM_ROOT=$memory/root
    export QWT_SLURM_ROOT
    exec chroot "$memory/root" "$0" "$folders" "$@"
fi

if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d # packages start nothing
    chmod +x /usr/sbin/policy-rc.d
    {
        apt-get update
        DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends slurm-wlm munge
    } >/var/log/packages 2>&1 || {
        tail -5 /var/log/packages >&2
        exit 77 # no packages
    }
fi

echo "127.0.0.1 $(hostname)" >>/etc/hosts
mkdir -p /run/munge /etc/slurm /var/spool/slurmctld /var/spool/slurmd
chown munge: /run/munge
runuser -u munge -- munged
mknod /gpu0 c 1 3
echo 'Name=gpu File=/gpu0' >/etc/slurm/gres.conf
cat >/etc/slurm/slurm.conf <<EOF
ClusterName=test
SlurmctldHost=$(hostname)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MinJobAge=300
ReturnToService=2
MpiDefault=none
GresTypes=gpu
NodeName=$(hostname) NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
slurmctld
sleep 1
slurmd
for _ in $(seq 30); do
    sinfo --noheader --format %t | grep -q idle && exec "$@"
    sleep 1
done
echo "The node does not become idle:" >&2
tail -5 /var/log/slurm*/*.log >&2
exit 1
