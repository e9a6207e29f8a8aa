//! Block devices with sectors of 512 and 4096 bytes: loop devices, where this user may make them.

mod common;

use common::*;
use holdfast_disk::*;
use std::path::{Path, PathBuf};
use std::process::Command;

struct Loop(PathBuf);

impl Loop {
    fn over(file: &Path, sector: u32) -> Option<Loop> {
        let made = Command::new("losetup")
            .args([
                "--find",
                "--show",
                "--direct-io=on",
                "--sector-size",
                &sector.to_string(),
            ])
            .arg(file)
            .output();
        match made {
            Ok(output) if output.status.success() => Some(Loop(PathBuf::from(
                String::from_utf8_lossy(&output.stdout).trim(),
            ))),
            Ok(output) => {
                eprintln!(
                    "skipped: losetup refused ({})",
                    String::from_utf8_lossy(&output.stderr).trim()
                );
                None
            }
            Err(error) => {
                eprintln!("skipped: no losetup here ({error})");
                None
            }
        }
    }
}

/// Anyone's `losetup --find` claims each device it passes for an instant, which an exclusive open meets as "in use": what
/// `lock_wait` is for.
fn patient() -> OpenOptions {
    OpenOptions {
        lock_wait: std::time::Duration::from_secs(30),
        ..OpenOptions::default()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .arg("--detach")
            .arg(&self.0)
            .status();
    }
}

#[test]
fn both_sector_sizes_write_zero_and_discard_as_files_do() {
    for sector in [512, 4096] {
        let dir = disk_dir();
        let image = dir.path().join("image");
        std::fs::File::create(&image)
            .expect("create")
            .set_len(4 << 20)
            .expect("size");
        let Some(device) = Loop::over(&image, sector) else {
            return;
        };
        let pool = pool();
        let ring = ring(&pool);
        let backing = Backing::open(&device.0, &patient()).expect("open");
        assert_eq!(
            (backing.kind(), backing.sector_size(), backing.size()),
            (BackingKind::BlockDevice, sector, 4 << 20)
        );
        let file = ring.attach(backing);
        zero_everywhere(&ring, &pool, file, u64::from(sector));
        write(
            &ring,
            &pool,
            file,
            (4 << 20) - 4096,
            &pattern(1, 4096),
            true,
        )
        .expect("last block");
        run(&ring, Op::Flush { file }).expect("flush");
        assert_eq!(
            read(&ring, &pool, file, (4 << 20) - 4096, 4096).expect("read"),
            pattern(1, 4096)
        );
        let error =
            write(&ring, &pool, file, 4 << 20, &[0; 4096], false).expect_err("beyond the end");
        assert_eq!(error.kind, DiskErrorKind::BeyondEnd { size: 4 << 20 });
        if sector == 4096 {
            let error =
                write(&ring, &pool, file, 512, &[0; 512], false).expect_err("half a sector");
            assert_eq!(error.kind, DiskErrorKind::Misaligned { sector: 4096 });
            let small = OpenOptions {
                sector_size: Some(512),
                read_only: true,
                shared_device: true,
                ..OpenOptions::default()
            };
            drop(ring);
            assert!(matches!(
                Backing::open(&device.0, &small),
                Err(OpenError::SectorSize { needed: 4096, .. })
            ));
        }
    }
}

#[test]
fn a_device_in_use_and_a_second_name_for_the_same_bytes_are_refused() {
    let dir = disk_dir();
    let image = dir.path().join("image");
    std::fs::File::create(&image)
        .expect("create")
        .set_len(4 << 20)
        .expect("size");

    let by_name = Backing::open(&image, &OpenOptions::default()).expect("nobody uses it");
    let Some(device) = Loop::over(&image, 512) else {
        return;
    };
    let shared = OpenOptions {
        shared_device: true,
        ..OpenOptions::default()
    };
    let other = Backing::open(&device.0, &shared);
    assert!(
        matches!(&other, Err(OpenError::Aliased { other, .. }) if other.contains("image")),
        "{other:?}"
    );
    drop(by_name);

    let by_device = Backing::open(&device.0, &patient()).expect("free now");
    assert!(matches!(
        Backing::open(&device.0, &OpenOptions::default()),
        Err(OpenError::InUse { .. })
    ));
    assert!(matches!(
        Backing::open(&device.0, &shared),
        Err(OpenError::Locked { .. })
    ));
    // The lock of the file under the device is taken too.
    assert!(matches!(
        Backing::open(&image, &OpenOptions::default()),
        Err(OpenError::Locked { .. })
    ));
    drop(by_device);
    let other = Backing::open(&image, &OpenOptions::default());
    assert!(
        matches!(&other, Err(OpenError::Aliased { other, .. }) if other.starts_with("/dev/loop")),
        "{other:?}"
    );
}

#[test]
fn a_mounted_device_is_refused() {
    let dir = disk_dir();
    let image = dir.path().join("image");
    std::fs::File::create(&image)
        .expect("create")
        .set_len(16 << 20)
        .expect("size");
    let Some(device) = Loop::over(&image, 512) else {
        return;
    };
    let ok = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
    let mount_point = dir.path().join("mounted");
    std::fs::create_dir(&mount_point).expect("directory");
    if !ok(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&device.0))
        || !ok(Command::new("mount").arg(&device.0).arg(&mount_point))
    {
        eprintln!("skipped: cannot make or mount a filesystem here");
        return;
    }
    let opened = Backing::open(&device.0, &OpenOptions::default());
    let unmounted = ok(Command::new("umount").arg(&mount_point));
    assert!(
        matches!(&opened, Err(OpenError::InUse { .. })),
        "{opened:?}"
    );
    assert!(unmounted);
}
