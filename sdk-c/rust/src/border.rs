//! The calls of the C library, each with Rust's lifetimes around it. The unsafe code of this crate is here, but for one block of lib.rs that joins a
//! record with its mapping.
#![allow(unsafe_code, reason = "the border to the C library")]

use std::ffi::{CStr, CString, c_char};
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use argo_streams::StageHandle;
use argo_streams::calls;
use argo_streams::status::{AGS_CLASS_TRY_AGAIN, AGS_OK};
use argo_streams::types::{
    AGS_RECORD_KEYED, AGS_STAGE_TELL_INPUT_OVER, AgsBytes, AgsCursor, AgsEmit, AgsEntry, AgsRecord, AgsStageOptions,
};

use crate::Error;

/// Bytes that somebody else owns: a slice, or shared memory, which another process may write. So safe code may copy them and pass
/// them on, but has no `&[u8]` of them.
#[derive(Clone, Copy, Debug)]
pub struct Bytes<'a> {
    data: NonNull<u8>,
    len: usize,
    owner: PhantomData<&'a [u8]>,
}

impl<'a> Bytes<'a> {
    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A copy.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut copy = Vec::new();
        self.append_to(&mut copy);
        copy
    }

    /// Appends a copy to `out`: with a vector that is used again nothing is allocated.
    pub fn append_to(&self, out: &mut Vec<u8>) {
        out.reserve(self.len);
        let end = out.spare_capacity_mut().as_mut_ptr().cast::<u8>();
        // SAFETY: `len` readable bytes during 'a, and the vector has reserved as many of its own.
        unsafe { std::ptr::copy_nonoverlapping(self.data.as_ptr(), end, self.len) };
        // SAFETY: so many were just written.
        unsafe { out.set_len(out.len() + self.len) };
    }

    /// The bytes in place, without a copy.
    ///
    /// # Safety
    /// Nobody may write them during `'a`. Of bytes made of a slice that is certain. Those of a record lie in memory that the
    /// program of the step before can write; one that uses this library does not touch a record before it is finished, but nothing
    /// enforces that. Who does not trust it copies.
    #[must_use]
    pub unsafe fn as_slice(&self) -> &'a [u8] {
        // SAFETY: `len` readable bytes during 'a, which nobody writes by the contract above.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }

    fn raw(self) -> AgsBytes {
        AgsBytes { data: self.data.as_ptr().cast(), len_bytes: self.len as u64 }
    }

    /// # Safety
    /// NULL or a length of 0, or readable during `'a`.
    unsafe fn of(bytes: AgsBytes) -> Self {
        match NonNull::new(bytes.data.cast_mut().cast()) {
            Some(data) => Self { data, len: usize::try_from(bytes.len_bytes).unwrap_or(0), owner: PhantomData },
            None => Self::from(&[]),
        }
    }
}

impl<'a, T: AsRef<[u8]> + ?Sized> From<&'a T> for Bytes<'a> {
    fn from(slice: &'a T) -> Self {
        let slice = slice.as_ref();
        Self { data: NonNull::from(slice).cast(), len: slice.len(), owner: PhantomData }
    }
}

impl PartialEq<[u8]> for Bytes<'_> {
    fn eq(&self, other: &[u8]) -> bool {
        self.to_vec() == other
    }
}

/// The bytes of a received record.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts<'a> {
    pub(crate) payload: Bytes<'a>,
    pub(crate) key: Option<Bytes<'a>>,
    pub(crate) attributes: Bytes<'a>,
}

/// What is emitted, beside its payload.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EmitParts<'a> {
    pub(crate) flags: u32,
    pub(crate) belongs_to: u32,
    pub(crate) nth: u64,
    pub(crate) key_choice: u32,
    pub(crate) key: Bytes<'a>,
    pub(crate) event_time_ns: i64,
    pub(crate) attributes: Bytes<'a>,
}

/// An open stage. Any thread may use it, one at a time; dropped without [`Handle::close`] it stays open until the process ends.
#[derive(Debug)]
pub(crate) struct Handle {
    stage: NonNull<StageHandle>,
    /// What interrupters know of it: `None` when it is closed.
    shared: Arc<Mutex<Option<Shared>>>,
}

#[derive(Debug)]
struct Shared(NonNull<StageHandle>);

// SAFETY: the library locks a stage by itself, and its calls may come from any thread.
unsafe impl Send for Handle {}
// SAFETY: only ags_stage_interrupt is called over it, which may come from any thread while the stage is open.
unsafe impl Send for Shared {}

/// Ends a wait of its stage from another thread.
#[derive(Clone, Debug)]
pub struct Interrupter {
    shared: Arc<Mutex<Option<Shared>>>,
}

impl Interrupter {
    /// The wait that is under way, or the next one, ends with an [`Error`] whose `is_interrupted` is true. Nothing happens when the
    /// stage is closed. Blocks only while the stage is being closed.
    pub fn interrupt(&self) {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Shared(stage)) = &*shared {
            // SAFETY: open, because close takes it out under the same lock.
            let _always_good = unsafe { calls::ags_stage_interrupt(stage.as_ptr()) };
        }
    }
}

fn text(pointer: *const c_char) -> String {
    // SAFETY: the library's strings end with a zero byte, and are valid until its next call on this thread.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

/// The error of a status, with the sentence that the library left on this thread.
pub(crate) fn error(status: i32) -> Error {
    let sentence = text(calls::ags_last_error());
    let is_plain = calls::ags_status_class(status) == AGS_CLASS_TRY_AGAIN || sentence.is_empty();
    let sentence = if is_plain { text(calls::ags_status_text(status)) } else { sentence };
    Error::new(status, text(calls::ags_status_name(status)), sentence)
}

fn check(status: i32) -> Result<(), Error> {
    if status == AGS_OK { Ok(()) } else { Err(error(status)) }
}

impl Handle {
    pub(crate) fn open(socket_path: Option<&CString>) -> Result<Self, Error> {
        let options = AgsStageOptions {
            struct_size: u32::try_from(size_of::<AgsStageOptions>()).unwrap_or(0),
            flags: AGS_STAGE_TELL_INPUT_OVER,
            socket_path: socket_path.map_or(std::ptr::null(), |path| path.as_ptr()),
            connect_timeout_ns: 0,
        };
        let mut stage = std::ptr::null_mut();
        // SAFETY: both point to locals, and the path is a string for the call.
        check(unsafe { calls::ags_stage_open(&raw const options, &raw mut stage) })?;
        let stage = NonNull::new(stage).ok_or_else(|| error(argo_streams::status::AGS_INVALID))?;
        Ok(Self { stage, shared: Arc::new(Mutex::new(Some(Shared(stage)))) })
    }

    pub(crate) fn interrupter(&self) -> Interrupter {
        Interrupter { shared: Arc::clone(&self.shared) }
    }

    pub(crate) fn name(&self) -> String {
        // SAFETY: open.
        text(unsafe { calls::ags_stage_name(self.stage.as_ptr()) })
    }

    /// How many came, or a status that may be no failure. The same for the calls below that return a status.
    pub(crate) fn recv(&mut self, records: &mut [AgsRecord]) -> Result<u32, i32> {
        let (max, mut count) = (u32::try_from(records.len()).unwrap_or(u32::MAX), 0);
        // SAFETY: open, and the slice has room for `max`.
        let status = unsafe { calls::ags_stage_recv(self.stage.as_ptr(), records.as_mut_ptr(), max, &raw mut count) };
        if status == AGS_OK { Ok(count) } else { Err(status) }
    }

    /// Where the records of an input lie; for [`parts`] only.
    pub(crate) fn map(&self, input: u32) -> Result<usize, Error> {
        let (mut base, mut len) = (std::ptr::null(), 0);
        // SAFETY: open, and the outputs are locals.
        check(unsafe { calls::ags_stage_map(self.stage.as_ptr(), input, &raw mut base, &raw mut len) })?;
        Ok(base.expose_provenance())
    }

    pub(crate) fn wait(&self) -> Result<(), Error> {
        // SAFETY: open.
        check(unsafe { calls::ags_stage_wait(self.stage.as_ptr(), u64::MAX) })
    }

    pub(crate) fn done(&self, records: u32) -> Result<(), Error> {
        // SAFETY: open.
        check(unsafe { calls::ags_stage_done(self.stage.as_ptr(), records) })
    }

    pub(crate) fn emit(&self, output: u32, emit: &EmitParts<'_>, payload: Bytes<'_>) -> i32 {
        let emit = AgsEmit {
            struct_size: u32::try_from(size_of::<AgsEmit>()).unwrap_or(0),
            flags: emit.flags,
            belongs_to: emit.belongs_to,
            key_choice: emit.key_choice,
            nth: emit.nth,
            event_time_ns: emit.event_time_ns,
            key: emit.key.raw(),
            attributes: emit.attributes.raw(),
            payload: payload.raw(),
        };
        // SAFETY: open, and all bytes outlive the call.
        unsafe { calls::ags_stage_emit(self.stage.as_ptr(), output, &raw const emit) }
    }

    pub(crate) fn reject(&self, nth: u64, reason: &CStr) -> i32 {
        // SAFETY: open, and a string.
        unsafe { calls::ags_stage_reject(self.stage.as_ptr(), nth, reason.as_ptr()) }
    }

    pub(crate) fn fail(&self, reason: &CStr) -> i32 {
        // SAFETY: open, and a string.
        unsafe { calls::ags_stage_fail(self.stage.as_ptr(), reason.as_ptr()) }
    }

    pub(crate) fn get(&self, key: Bytes<'_>, out: &mut Vec<u8>) -> Result<bool, Error> {
        let mut value = AgsBytes { data: std::ptr::null(), len_bytes: 0 };
        // SAFETY: open, and the output is a local.
        check(unsafe { calls::ags_stage_get(self.stage.as_ptr(), key.raw(), &raw mut value) })?;
        if value.data.is_null() {
            return Ok(false);
        }
        // SAFETY: valid until the next call for state.
        unsafe { Bytes::of(value) }.append_to(out);
        Ok(true)
    }

    pub(crate) fn put(&self, key: Bytes<'_>, value: Bytes<'_>) -> i32 {
        // SAFETY: open, and the bytes outlive the call.
        unsafe { calls::ags_stage_put(self.stage.as_ptr(), key.raw(), value.raw()) }
    }

    pub(crate) fn delete(&self, key: Bytes<'_>) -> i32 {
        // SAFETY: open, and the bytes outlive the call.
        unsafe { calls::ags_stage_delete(self.stage.as_ptr(), key.raw()) }
    }

    pub(crate) fn iterate(&self, cursor: &mut AgsCursor, mut show: impl FnMut(Vec<u8>, Vec<u8>)) -> Result<(), Error> {
        let nothing = AgsBytes { data: std::ptr::null(), len_bytes: 0 };
        let (mut entries, mut count) = ([AgsEntry { key: nothing, value: nothing }; 64], 0);
        let (from, to) = (&raw const *cursor, &raw mut *cursor);
        // SAFETY: open; room for 64; the cursor may be written over.
        check(unsafe {
            calls::ags_stage_iterate(self.stage.as_ptr(), from, entries.as_mut_ptr(), 64, &raw mut count, to)
        })?;
        for entry in entries.iter().take(count as usize) {
            // SAFETY: valid until the next iterate.
            let key = unsafe { Bytes::of(entry.key) }.to_vec();
            // SAFETY: as above.
            show(key, unsafe { Bytes::of(entry.value) }.to_vec());
        }
        Ok(())
    }

    pub(crate) fn close(&self) {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Shared(stage)) = shared.take() {
            // SAFETY: open, and nobody finds it any more: `Stage` gives its handle up with this.
            unsafe { calls::ags_stage_close(stage.as_ptr()) };
        }
    }
}

/// The bytes of a record that was received and is not done.
///
/// # Safety
/// `base` is what [`Handle::map`] said for the record's input and generation, and the record stays undone during `'a`.
pub(crate) unsafe fn parts<'a>(base: usize, record: &AgsRecord) -> Parts<'a> {
    let at = |offset: u64, len_bytes: u64| {
        let data = std::ptr::with_exposed_provenance::<u8>(base.wrapping_add(usize::try_from(offset).unwrap_or(0)));
        // SAFETY: within the mapping, which stays until the record is done.
        unsafe { Bytes::of(AgsBytes { data: data.cast(), len_bytes }) }
    };
    Parts {
        payload: at(record.offset, record.len_bytes),
        key: (record.flags & AGS_RECORD_KEYED != 0).then(|| at(record.key_offset, record.key_len_bytes)),
        attributes: at(record.attributes_offset, record.attributes_len_bytes),
    }
}

/// The value of an attribute in an encoded list.
pub(crate) fn attribute(list: Bytes<'_>, name: &str) -> Result<Option<Vec<u8>>, Error> {
    let mut value = AgsBytes { data: std::ptr::null(), len_bytes: 0 };
    // SAFETY: the bytes outlive the call, and the output is a local.
    check(unsafe { calls::ags_attributes_find(list.raw(), Bytes::from(name).raw(), &raw mut value) })?;
    // SAFETY: within the list.
    Ok((!value.data.is_null()).then(|| unsafe { Bytes::of(value) }.to_vec()))
}

/// Appends an attribute to an encoded list.
pub(crate) fn append_attribute(list: &mut Vec<u8>, name: &str, value: Bytes<'_>) -> Result<(), Error> {
    let (used, mut used_after) = (list.len(), 0);
    list.resize(used + name.len() + value.len() + 8, 0);
    let (buffer, capacity) = (list.as_mut_ptr().cast(), list.len() as u64);
    let name = Bytes::from(name).raw();
    // SAFETY: the buffer has the capacity that is named, and the output is a local.
    let status =
        unsafe { calls::ags_attributes_append(buffer, capacity, used as u64, name, value.raw(), &raw mut used_after) };
    list.truncate(if status == AGS_OK { usize::try_from(used_after).unwrap_or(used) } else { used });
    check(status)
}
