//! What a configuration means on this machine: same disks under different names, state on a replicated volume.
//!
//! Nothing here opens a device; the disk layer does that, with locks. Addresses and sockets in use are found when
//! they are bound.

use super::{Config, ConfigError, MetadataPlace};
use std::collections::HashMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Checks the configuration against the machine.
///
/// # Errors
/// Two volumes reach the same file or device; the state directory, a backing or external metadata is on a device
/// that a replicator (this one, as far as can be told) serves; the state directory is missing.
pub fn environment(config: &Config) -> Result<(), ConfigError> {
    let mounts = Mounts::read();
    let wrong = |key: String, what: String, next: &str| ConfigError::Key {
        file: config.file.clone(),
        key,
        what,
        next: next.to_owned(),
    };
    let state_dir = &config.node.state_dir;
    if !state_dir.is_dir() {
        return Err(wrong(
            "node.state_dir".into(),
            format!("{} is not a directory", state_dir.display()),
            "create it with `holdfast init`, or correct the path",
        ));
    }
    if !config.node.state_may_be_on_nbd
        && let Some(device) = mounts.network_block_device(state_dir)
    {
        return Err(wrong(
            "node.state_dir".into(),
            format!(
                "{} is on {}, a device served by a process: while this replicator waits to write its state there, \
                 the volume may be waiting for this replicator",
                state_dir.display(),
                device.display()
            ),
            "move the state to a local disk; if the device has nothing to do with this node, set node.state_may_be_on_nbd = true",
        ));
    }
    let mut places: HashMap<Place, String> = HashMap::new();
    for service in &config.services {
        for volume in &service.volumes {
            let external = match &volume.metadata {
                MetadataPlace::Internal => None,
                MetadataPlace::External(path) => Some(("metadata", path)),
            };
            for (part, path) in [("backing", &volume.backing)].into_iter().chain(external) {
                let key = format!("service {:?}.volume {:?}.{part}", service.name, volume.name);
                if let Some(device) = mounts.network_block_device(path) {
                    return Err(wrong(
                        key,
                        format!(
                            "{} is on {}, a device served by a process",
                            path.display(),
                            device.display()
                        ),
                        "use a local disk: a volume below itself would wait for itself",
                    ));
                }
                // A path that is not there yet may be created later; the disk layer reports it when it is needed.
                let Some(place) = Place::of(path) else {
                    continue;
                };
                if let Some(other) = places.insert(place, key.clone()) {
                    return Err(wrong(
                        key,
                        format!("{} is the same file or device as {other}", path.display()),
                        "give each volume and each external metadata area a place of its own",
                    ));
                }
            }
        }
    }
    Ok(())
}

/// What a path leads to, whatever it is called.
#[derive(PartialEq, Eq, Hash)]
enum Place {
    File { device: u64, inode: u64 },
    Device { number: u64 },
}

impl Place {
    fn of(path: &Path) -> Option<Place> {
        let metadata = std::fs::metadata(path).ok()?;
        Some(if metadata.file_type().is_block_device() {
            Place::Device {
                number: metadata.rdev(),
            }
        } else {
            Place::File {
                device: metadata.dev(),
                inode: metadata.ino(),
            }
        })
    }
}

/// Loop devices over files on loop devices, and so on: no more levels than this are followed.
const LEVELS: u32 = 8;

/// What is mounted where.
struct Mounts {
    /// Mount point, source and filesystem, the later ones on top.
    entries: Vec<Mount>,
}

struct Mount {
    point: PathBuf,
    source: PathBuf,
    filesystem: String,
}

impl Mounts {
    fn read() -> Mounts {
        // Without /proc nothing can be said, and this check is a help, not a guarantee.
        Mounts::parse(&std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
    }

    fn parse(mountinfo: &str) -> Mounts {
        let entries = mountinfo
            .lines()
            .filter_map(|line| {
                let (before, after) = line.split_once(" - ")?;
                let point = before.split(' ').nth(4)?;
                let mut after = after.split(' ');
                let filesystem = after.next()?.to_owned();
                let source = after.next()?;
                Some(Mount {
                    point: unescape(point),
                    source: unescape(source),
                    filesystem,
                })
            })
            .collect();
        Mounts { entries }
    }

    /// The device or mount under `path`, however deep, if a user-space process may be serving it.
    fn network_block_device(&self, path: &Path) -> Option<PathBuf> {
        self.served(path, Path::new("/sys"), LEVELS, false)
    }

    /// `carries`: the path holds what a block device stands on.
    fn served(&self, path: &Path, sys: &Path, levels: u32, carries: bool) -> Option<PathBuf> {
        let levels = levels.checked_sub(1)?;
        // The file may not exist yet: its nearest existing ancestor counts.
        let real = path
            .ancestors()
            .find_map(|ancestor| std::fs::canonicalize(ancestor).ok())?;
        if let Ok(device) = real.strip_prefix("/dev") {
            if is_served(&real) {
                return Some(real);
            }
            if let Some(name) = device.to_str().filter(|name| !name.contains('/')) {
                // A partition has no directory of its own there; the device it is on does.
                let under = below(sys, name);
                let mut found = under
                    .iter()
                    .filter_map(|path| self.served(path, sys, levels, true));
                if let Some(found) = found.next() {
                    return Some(found);
                }
            }
        }
        let mount = self
            .entries
            .iter()
            .filter(|mount| real.starts_with(&mount.point))
            .max_by_key(|mount| mount.point.as_os_str().len())?;
        // What block devices are made of on a FUSE filesystem, a process serves: nbdfuse and its like say no more of themselves.
        let by_fuse = mount.filesystem == "fuse" || mount.filesystem.starts_with("fuse.");
        if by_fuse && (carries || mount.filesystem.contains("nbdfuse")) {
            return Some(mount.point.clone());
        }
        if is_served(&mount.source) {
            return Some(mount.source.clone());
        }
        if mount.source.starts_with("/dev") && mount.source != real {
            return self.served(&mount.source, sys, levels, carries);
        }
        None
    }
}

/// What a block device stands on, as far as the kernel says: the file under a loop device, the devices under a mapped one (LVM,
/// dm-crypt, multipath) or a RAID.
fn below(sys: &Path, name: &str) -> Vec<PathBuf> {
    let class = sys.join("class/block").join(name);
    // Of a partition the whole device; both are links into one tree.
    let whole = std::fs::canonicalize(&class)
        .ok()
        .filter(|real| real.join("partition").exists())
        .and_then(|real| Some(real.parent()?.to_owned()))
        .unwrap_or(class);
    let mut under = Vec::new();
    if let Ok(file) = std::fs::read_to_string(whole.join("loop/backing_file")) {
        under.push(PathBuf::from(file.trim_end_matches('\n')));
    }
    if let Ok(slaves) = std::fs::read_dir(whole.join("slaves")) {
        under.extend(
            slaves
                .flatten()
                .map(|slave| Path::new("/dev").join(slave.file_name())),
        );
    }
    under
}

fn is_served(device: &Path) -> bool {
    let Some(name) = device.to_str().and_then(|path| path.strip_prefix("/dev/")) else {
        return false;
    };
    ["nbd", "ublkb"].iter().any(|kind| {
        name.strip_prefix(kind)
            .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    })
}

/// Space, tab, newline and backslash are octal escapes in mountinfo.
fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes.get(at + 1..at + 4).and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        match octal {
            Some(byte) if bytes[at] == b'\\' => {
                out.push(byte);
                at += 4;
            }
            _ => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    std::ffi::OsString::from_vec(out).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "22 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw\n\
        30 22 43:0 / /srv/on\\040nbd rw - ext4 /dev/nbd0p1 rw\n\
        31 22 259:0 / /usr rw - ext4 /dev/ublkb3 rw\n";

    #[test]
    fn a_path_under_a_served_device_is_found() {
        let mounts = Mounts::parse(MOUNTS);
        assert_eq!(mounts.entries[1].point, Path::new("/srv/on nbd"));
        assert_eq!(
            mounts.network_block_device(Path::new("/usr/bin")),
            Some("/dev/ublkb3".into())
        );
        assert_eq!(
            mounts.network_block_device(Path::new("/usr/not/there/yet")),
            Some("/dev/ublkb3".into())
        );
        assert_eq!(mounts.network_block_device(Path::new("/etc")), None);
        assert!(is_served(Path::new("/dev/nbd12")));
        assert!(!is_served(Path::new("/dev/nbdkit")));
        assert!(!is_served(Path::new("/dev/sda1")));
    }

    /// A device below others: /dev/null stands for a file of the machine, what is on it is made up.
    #[test]
    fn what_a_device_stands_on_is_followed() {
        let sys = tempfile::tempdir().unwrap();
        let block = sys.path().join("class/block");
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::write(&image, "x").unwrap();
        std::fs::create_dir_all(block.join("null/loop")).unwrap();
        std::fs::write(
            block.join("null/loop/backing_file"),
            format!("{}\n", image.display()),
        )
        .unwrap();
        std::fs::create_dir_all(block.join("zero/slaves/null")).unwrap();
        let over = |filesystem: &str, source: &str| {
            let image = dir.path().display();
            Mounts::parse(&format!(
                "22 1 254:1 / / rw - ext4 /dev/vda1 rw\n30 22 0:50 / {image} rw - {filesystem} {source} rw\n"
            ))
        };
        let top = Path::new("/dev/zero");
        let found = |mounts: Mounts| mounts.served(top, sys.path(), LEVELS, false);
        assert_eq!(
            found(over("ext4", "/dev/nbd3p1")),
            Some("/dev/nbd3p1".into())
        );
        // A file of a process's filesystem carries no state by itself; a device made of it does.
        assert_eq!(
            found(over("fuse", "/dev/fuse")),
            Some(dir.path().to_owned())
        );
        let direct = over("fuse", "/dev/fuse");
        assert_eq!(direct.served(&image, sys.path(), LEVELS, false), None);
        assert_eq!(
            found(over("fuse.nbdfuse", "nbdfuse")),
            Some(dir.path().to_owned())
        );
        assert_eq!(found(over("fuseblk", "/dev/vdb")), None);
        assert_eq!(found(over("ext4", "/dev/vdb")), None);
        // A circle ends.
        std::fs::create_dir_all(block.join("null/slaves/zero")).unwrap();
        assert_eq!(found(over("ext4", "/dev/vdb")), None);
    }

    fn config(dir: &Path, second: &str) -> Config {
        let text = format!(
            "[node]\nname = \"a\"\nstate_dir = {dir:?}\n[[service]]\nname = \"db\"\n\
             id = \"0123456789abcdef0123456789abcdef\"\nslot = 0\n\
             [[service.volume]]\nname = \"x\"\nbacking = {:?}\n[[service.volume]]\nname = \"y\"\nbacking = {:?}\n",
            dir.join("one"),
            dir.join(second)
        );
        Config::parse(&text, Path::new("test.toml")).unwrap()
    }

    #[test]
    fn one_file_under_two_names_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("one"), "x").unwrap();
        std::fs::hard_link(dir.path().join("one"), dir.path().join("alias")).unwrap();
        std::fs::write(dir.path().join("two"), "x").unwrap();
        environment(&config(dir.path(), "two")).unwrap();
        let error = environment(&config(dir.path(), "alias"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("volume \"y\".backing") && error.contains("volume \"x\".backing"),
            "{error}"
        );
    }
}
