//! Segments: memory files that the agent makes, seals and hands out.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    MemfdFlags, Mode, SealFlags, fchmod, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create,
};

use crate::layout::{DATA_OFFSET, header};
use crate::limits::{RING_CAPACITY_BYTES_MAX, RING_CAPACITY_BYTES_MIN};
use crate::memory::{Access, Mapping, RingMapping};
use crate::version::{
    FEATURE_STATE_EXTENTS, FEATURES_COMPATIBLE, FEATURES_INCOMPATIBLE, FEATURES_READ_ONLY_COMPATIBLE, LAYOUT_MAJOR,
    LAYOUT_MINOR,
};

/// What a segment holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// A ring's bytes.
    Data = 1,
    /// A stage's commit page.
    Commit = 2,
    /// A stage's session page.
    Session = 3,
    /// An extent of keyed state.
    State = 4,
}

/// Why a segment is refused.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// The kernel refused.
    #[error("the kernel refused a segment: {0}")]
    System(#[from] io::Error),
    /// Not one of ours.
    #[error("not a segment of Argo Streams: its first word is {found:#018x}, expected {:#018x}", header::MAGIC_VALUE)]
    NotASegment {
        /// The first word.
        found: u64,
    },
    /// Of another layout.
    #[error(
        "the segment has layout {found_major}.{found_minor}, this program knows {LAYOUT_MAJOR}: use an agent and a library of the same major version"
    )]
    Version {
        /// Major version found.
        found_major: u16,
        /// Minor version found.
        found_minor: u16,
    },
    /// Needs features that this program does not know.
    #[error("the segment needs features {unknown:#x} that this program does not know: update it")]
    Features {
        /// The bits that are not known.
        unknown: u64,
    },
    /// Needs features of who writes it that this program does not know.
    #[error("the segment may be written only with features {unknown:#x} that this program does not know: update it")]
    FeaturesToWrite {
        /// The bits that are not known.
        unknown: u64,
    },
    /// Not the expected kind.
    #[error("expected a segment of kind {expected:?}, found kind number {found}")]
    Kind {
        /// What was expected.
        expected: Kind,
        /// What was found.
        found: u32,
    },
    /// Shorter than it says.
    #[error("the segment is {found} bytes long, expected at least {expected}")]
    TooShort {
        /// Length found.
        found: u64,
        /// Length needed.
        expected: u64,
    },
    /// Its owner could cut it short under a reader.
    #[error("the segment is not sealed against shrinking: its owner could cut it short under us")]
    NotSealed,
    /// A number in it is impossible.
    #[error("the segment says {field} = {found}, which is impossible: expected {expected}")]
    Impossible {
        /// The field.
        field: &'static str,
        /// Its value.
        found: u64,
        /// What would be possible.
        expected: &'static str,
    },
}

/// One segment: a descriptor and its length.
#[derive(Debug)]
pub struct Segment {
    descriptor: OwnedFd,
    len_bytes: u64,
    /// Features of who writes it that this program does not know: it may be read all the same.
    unknown_to_write: u64,
}

impl Segment {
    /// Makes a segment of `len_bytes` zeros with its header, mode 0600, sealed against shrinking and growing. The caller
    /// adds the other seals with [`Segment::seal`] once the owner has mapped it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn create(kind: Kind, len_bytes: u64, owner: u64, generation: u64) -> Result<Self, SegmentError> {
        let name = match kind {
            Kind::Data => c"argo-streams-data",
            Kind::Commit => c"argo-streams-commit",
            Kind::Session => c"argo-streams-session",
            Kind::State => c"argo-streams-state",
        };
        let descriptor =
            memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(io::Error::from)?;
        fchmod(&descriptor, Mode::RUSR | Mode::WUSR).map_err(io::Error::from)?;
        ftruncate(&descriptor, len_bytes).map_err(io::Error::from)?;
        fcntl_add_seals(&descriptor, SealFlags::SHRINK | SealFlags::GROW).map_err(io::Error::from)?;
        let segment = Self { descriptor, len_bytes, unknown_to_write: 0 };
        let version = u64::from(LAYOUT_MAJOR) << 32 | u64::from(LAYOUT_MINOR) << 48;
        segment.write_words(&[
            (header::MAGIC, header::MAGIC_VALUE),
            (header::KIND_AND_VERSION, u64::from(kind as u32) | version),
            (header::HEADER_LEN, header::LEN as u64),
            (header::FEATURES_INCOMPATIBLE, 0),
            (header::FEATURES_READ_ONLY_COMPATIBLE, FEATURES_READ_ONLY_COMPATIBLE),
            (header::FEATURES_COMPATIBLE, FEATURES_COMPATIBLE),
            (header::SEGMENT_LEN, len_bytes),
            (header::GENERATION, generation),
            (header::OWNER, owner),
        ])?;
        Ok(segment)
    }

    /// Makes the data segment of a ring. It is sparse: unused room costs no memory.
    ///
    /// # Errors
    /// What the kernel says, and capacities that are no powers of two in the limits.
    pub fn create_data(
        owner: u64,
        generation: u64,
        ring: u64,
        capacity: u64,
        large_capacity: u64,
    ) -> Result<Self, SegmentError> {
        check_capacity("ring_capacity", capacity)?;
        check_capacity("large_capacity", large_capacity)?;
        let segment = Self::create(Kind::Data, DATA_OFFSET as u64 + capacity + large_capacity, owner, generation)?;
        segment.write_words(&[
            (header::RING, ring),
            (header::RING_CAPACITY, capacity),
            (header::LARGE_CAPACITY, large_capacity),
        ])?;
        Ok(segment)
    }

    /// Makes an extent of keyed state. It is sparse: unused room costs no memory.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn create_state(owner: u64, generation: u64, extent: u32, len_bytes: u64) -> Result<Self, SegmentError> {
        let segment = Self::create(Kind::State, len_bytes, owner, generation)?;
        if extent > 0 {
            // Who knows only states of one segment must not take this for a whole one.
            segment.write_words(&[
                (header::RING, u64::from(extent)),
                (header::FEATURES_INCOMPATIBLE, FEATURE_STATE_EXTENTS),
            ])?;
        }
        Ok(segment)
    }

    /// Takes a descriptor that came from somewhere else, after looking at what it is.
    ///
    /// # Errors
    /// Everything that [`SegmentError`] lists.
    pub fn adopt(descriptor: OwnedFd, kind: Kind) -> Result<Self, SegmentError> {
        let seals = fcntl_get_seals(&descriptor).map_err(|_not_a_memfd| SegmentError::NotSealed)?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(SegmentError::NotSealed);
        }
        let len_bytes = u64::try_from(fstat(&descriptor).map_err(io::Error::from)?.st_size).unwrap_or(0);
        if len_bytes < header::LEN as u64 {
            return Err(SegmentError::TooShort { found: len_bytes, expected: header::LEN as u64 });
        }
        let mut segment = Self { descriptor, len_bytes, unknown_to_write: 0 };
        let magic = segment.read_word(header::MAGIC)?;
        if magic != header::MAGIC_VALUE {
            return Err(SegmentError::NotASegment { found: magic });
        }
        let word = segment.read_word(header::KIND_AND_VERSION)?;
        #[expect(clippy::cast_possible_truncation, reason = "the fields of a packed word")]
        let (found, found_major, found_minor) = (word as u32, (word >> 32) as u16, (word >> 48) as u16);
        if found_major != LAYOUT_MAJOR {
            return Err(SegmentError::Version { found_major, found_minor });
        }
        let unknown = segment.read_word(header::FEATURES_INCOMPATIBLE)? & !FEATURES_INCOMPATIBLE;
        if unknown != 0 {
            return Err(SegmentError::Features { unknown });
        }
        segment.unknown_to_write =
            segment.read_word(header::FEATURES_READ_ONLY_COMPATIBLE)? & !FEATURES_READ_ONLY_COMPATIBLE;
        if found != kind as u32 {
            return Err(SegmentError::Kind { expected: kind, found });
        }
        let said = segment.read_word(header::SEGMENT_LEN)?;
        if said > len_bytes {
            return Err(SegmentError::TooShort { found: len_bytes, expected: said });
        }
        Ok(segment)
    }

    /// Forbids every further writable mapping, write, and seal. The owner's own mapping goes on writing.
    ///
    /// # Errors
    /// What the kernel says: after the first call nothing can be added.
    pub fn seal(&self) -> Result<(), SegmentError> {
        // In one call: after SEAL nothing can be added.
        fcntl_add_seals(&self.descriptor, SealFlags::FUTURE_WRITE | SealFlags::SEAL).map_err(io::Error::from)?;
        Ok(())
    }

    /// A descriptor of the segment through which it can be mapped for reading only. For a segment that cannot be sealed
    /// because a successor of its owner must write it: who has another user id than the owner cannot open it again for
    /// writing (mode 0600).
    ///
    /// # Errors
    /// What the kernel says; it needs /proc.
    pub fn read_only(&self) -> Result<OwnedFd, SegmentError> {
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.descriptor));
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
        Ok(rustix::fs::open(path, flags, Mode::empty()).map_err(io::Error::from)?)
    }

    /// Device and inode: what a journal knows a segment by.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn identity(&self) -> Result<(u64, u64), SegmentError> {
        let found = fstat(&self.descriptor).map_err(io::Error::from)?;
        Ok((found.st_dev, found.st_ino))
    }

    /// Whose segment it is and of which incarnation: the stage and the generation in its header. Its owner can write them, so
    /// they are compared with what a journal says and not believed.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn owner(&self) -> Result<(u64, u64), SegmentError> {
        Ok((self.read_word(header::OWNER)?, self.read_word(header::GENERATION)?))
    }

    /// Whether nobody can map it for writing any more.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn is_sealed(&self) -> Result<bool, SegmentError> {
        let seals = fcntl_get_seals(&self.descriptor).map_err(io::Error::from)?;
        Ok(seals.contains(SealFlags::FUTURE_WRITE))
    }

    /// Maps the whole segment as words.
    ///
    /// # Errors
    /// For writing, features that this program does not know; and what the kernel says.
    pub fn map(&self, access: Access) -> Result<Mapping, SegmentError> {
        self.check_access(access)?;
        let len = usize::try_from(self.len_bytes)
            .map_err(|_too_long| SegmentError::TooShort { found: 0, expected: self.len_bytes })?;
        Ok(Mapping::new(self.descriptor.as_fd(), len, access).map_err(io::Error::from)?)
    }

    /// Maps a data segment as a ring with the capacities that its grant named. The header is not believed: the producer may write it.
    ///
    /// # Errors
    /// Impossible capacities, a segment that is shorter, for writing features that this program does not know, and what the kernel
    /// says.
    pub fn map_ring(&self, capacity: u64, large_capacity: u64, access: Access) -> Result<RingMapping, SegmentError> {
        self.check_access(access)?;
        check_capacity("ring_capacity", capacity)?;
        check_capacity("large_capacity", large_capacity)?;
        let expected = DATA_OFFSET as u64 + capacity + large_capacity;
        if self.len_bytes < expected {
            return Err(SegmentError::TooShort { found: self.len_bytes, expected });
        }
        Ok(RingMapping::new(self.descriptor.as_fd(), capacity, large_capacity, access).map_err(io::Error::from)?)
    }

    /// Length of the segment.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// The descriptor, for sending it.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    /// A second descriptor of the same segment.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn duplicate(&self) -> Result<Self, SegmentError> {
        let descriptor = self.descriptor.try_clone()?;
        Ok(Self { descriptor, len_bytes: self.len_bytes, unknown_to_write: self.unknown_to_write })
    }

    /// Bytes of memory that the segment takes at present.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn resident_bytes(&self) -> Result<u64, SegmentError> {
        let blocks = fstat(&self.descriptor).map_err(io::Error::from)?.st_blocks;
        Ok(u64::try_from(blocks).unwrap_or(0) * 512)
    }

    fn check_access(&self, access: Access) -> Result<(), SegmentError> {
        match (access, self.unknown_to_write) {
            (Access::ReadOnly, _) | (Access::Writable, 0) => Ok(()),
            (Access::Writable, unknown) => Err(SegmentError::FeaturesToWrite { unknown }),
        }
    }

    fn write_words(&self, words: &[(usize, u64)]) -> Result<(), SegmentError> {
        for (offset, value) in words {
            rustix::io::pwrite(&self.descriptor, &value.to_le_bytes(), *offset as u64).map_err(io::Error::from)?;
        }
        Ok(())
    }

    fn read_word(&self, offset: usize) -> Result<u64, SegmentError> {
        let mut bytes = [0_u8; 8];
        let read = rustix::io::pread(&self.descriptor, &mut bytes, offset as u64).map_err(io::Error::from)?;
        if read != bytes.len() {
            return Err(SegmentError::TooShort { found: (offset + read) as u64, expected: offset as u64 + 8 });
        }
        Ok(u64::from_le_bytes(bytes))
    }
}

fn check_capacity(field: &'static str, found: u64) -> Result<(), SegmentError> {
    if found.is_power_of_two() && (RING_CAPACITY_BYTES_MIN..=RING_CAPACITY_BYTES_MAX).contains(&found) {
        Ok(())
    } else {
        Err(SegmentError::Impossible { field, found, expected: "a power of two from 4 KiB to 1 GiB" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Bytes as _;

    #[test]
    fn a_sealed_segment_cannot_be_mapped_for_writing_again() {
        let segment = Segment::create_data(1, 1, 7, 4096, 4096).unwrap();
        let owner = segment.map_ring(4096, 4096, Access::Writable).unwrap();
        segment.seal().unwrap();
        crate::memory::Bytes::write(&owner, 10, b"still writes");
        assert!(segment.map_ring(4096, 4096, Access::Writable).is_err());
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&segment.descriptor()));
        let reopened = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        assert!(
            Mapping::new(reopened.as_fd(), 4096, Access::Writable).is_err(),
            "reopening must be no way around the seal"
        );
        assert!(reopened.set_len(0).is_err() && reopened.set_len(1 << 20).is_err());
        assert!(rustix::io::pwrite(&reopened, b"x", 0).is_err());
        assert!(segment.seal().is_err(), "nothing can be added to SEAL");
        let mut read = [0; 12];
        crate::memory::Bytes::read(&segment.map_ring(4096, 4096, Access::ReadOnly).unwrap(), 10, &mut read);
        assert_eq!(&read, b"still writes");
    }

    #[test]
    fn what_is_not_ours_is_refused_with_a_reason() {
        let file = tempfile_descriptor();
        assert!(matches!(Segment::adopt(file, Kind::Commit), Err(SegmentError::NotSealed)));
        let segment = Segment::create(Kind::Session, 8192, 1, 1).unwrap();
        let again = segment.descriptor.try_clone().unwrap();
        assert!(matches!(Segment::adopt(again, Kind::Commit), Err(SegmentError::Kind { found: 3, .. })));
        for (offset, value) in [
            (header::MAGIC, 1),
            (header::KIND_AND_VERSION, 3 | 9 << 32),
            (header::FEATURES_INCOMPATIBLE, 8),
            (header::SEGMENT_LEN, 9999),
        ] {
            let segment = Segment::create(Kind::Session, 8192, 1, 1).unwrap();
            segment.write_words(&[(offset, value)]).unwrap();
            let refusal = Segment::adopt(segment.descriptor.try_clone().unwrap(), Kind::Session).unwrap_err();
            assert!(!refusal.to_string().is_empty(), "{refusal:?}");
        }
        assert!(Segment::create_data(1, 1, 1, 5000, 4096).is_err());
        assert!(segment.map_ring(4096, 1 << 20, Access::ReadOnly).is_err());
    }

    #[test]
    fn wrapping_positions_are_contiguous() {
        let segment = Segment::create_data(1, 1, 7, 4096, 4096).unwrap();
        let ring = segment.map_ring(4096, 4096, Access::Writable).unwrap();
        let text: Vec<u8> = (0..200_u8).collect();
        ring.write(4096 * 5 - 100, &text);
        let mut back = vec![0; 200];
        ring.read(4096 * 9 - 100, &mut back);
        assert_eq!(back, text);
        ring.shift(4096 * 5 - 100, 4096 * 5 - 36, 200);
        ring.read(4096 * 5 - 36, &mut back);
        assert_eq!(back, text);
        ring.write_large(4096 - 3, &text);
        ring.read_large(4096 * 3 - 3, &mut back);
        assert_eq!(back, text);
    }

    fn tempfile_descriptor() -> OwnedFd {
        let descriptor = memfd_create(c"not-ours", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&descriptor, 8192).unwrap();
        descriptor
    }
}
