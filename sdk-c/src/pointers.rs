//! One of the two unsafe files: from what C passes to what Rust may touch. Every function here checks for NULL first.
#![allow(unsafe_code, reason = "pointers from C")]

use std::ffi::{CStr, OsStr, c_char};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::status::{AGS_INVALID, AGS_VERSION, Failure};
use crate::types::AgsBytes;

/// No struct of ours will be larger; a larger size is one that nobody set.
const STRUCT_SIZE_MAX: usize = 4096;

fn null(what: &str) -> Failure {
    Failure::new(AGS_INVALID, format!("{what} is NULL"))
}

/// Bytes that the caller keeps alive and unchanged during the call.
///
/// # Safety
/// `data`, unless NULL, points to `len_bytes` readable bytes that nobody changes during `'a`.
pub(crate) unsafe fn bytes<'a>(bytes: AgsBytes, what: &str) -> Result<&'a [u8], Failure> {
    if bytes.len_bytes == 0 {
        return Ok(&[]);
    }
    if bytes.data.is_null() {
        return Err(null(what));
    }
    let len = usize::try_from(bytes.len_bytes).ok().filter(|len| isize::try_from(*len).is_ok());
    let len = len.ok_or_else(|| Failure::new(AGS_INVALID, format!("{what} cannot have {} bytes", bytes.len_bytes)))?;
    // SAFETY: not NULL and of a length that can be; the caller of the C function keeps the bytes for the call.
    Ok(unsafe { std::slice::from_raw_parts(bytes.data.cast::<u8>(), len) })
}

/// A reference to something that C holds a pointer to.
///
/// # Safety
/// `pointer`, unless NULL, is a valid `T` for `'a` that nobody changes.
pub(crate) unsafe fn reference<'a, T>(pointer: *const T, what: &str) -> Result<&'a T, Failure> {
    // SAFETY: valid unless NULL, by the caller of the C function.
    unsafe { pointer.as_ref() }.ok_or_else(|| null(what))
}

/// Refuses NULL where an output will be written.
pub(crate) fn output<T>(pointer: *mut T, what: &str) -> Result<*mut T, Failure> {
    if pointer.is_null() { Err(null(what)) } else { Ok(pointer) }
}

/// A path.
///
/// # Safety
/// `pointer`, unless NULL, is a string that ends with a zero byte and stays during `'a`.
pub(crate) unsafe fn path<'a>(pointer: *const c_char) -> Option<&'a Path> {
    if pointer.is_null() {
        return None;
    }
    // SAFETY: a string with its end, by the caller of the C function.
    let text = unsafe { CStr::from_ptr(pointer) };
    Some(Path::new(OsStr::from_bytes(text.to_bytes())))
}

/// A sentence. Bytes that are not UTF-8 are replaced.
///
/// # Safety
/// As [`path`].
pub(crate) unsafe fn text(pointer: *const c_char, what: &str) -> Result<String, Failure> {
    if pointer.is_null() {
        return Err(null(what));
    }
    // SAFETY: a string with its end, by the caller of the C function.
    let text = unsafe { CStr::from_ptr(pointer) };
    Ok(text.to_string_lossy().into_owned())
}

/// Copies a struct that begins with its `struct_size`. One of an older program is shorter: the rest is zero, which is every
/// field's default. One of a newer program is longer: what is beyond must be zero, or it asks for what we cannot do.
///
/// # Safety
/// `pointer`, unless NULL, points to at least 4 readable bytes, and to as many as the first four say. `T` is a struct of
/// integers and pointers, for which zero bytes are a value.
#[inline]
pub(crate) unsafe fn versioned<T: Copy>(pointer: *const T, least: usize, what: &str) -> Result<T, Failure> {
    if pointer.is_null() {
        return Err(null(what));
    }
    // SAFETY: not NULL, and the first field is the u32 size; read without asking for alignment.
    let size = unsafe { pointer.cast::<u32>().read_unaligned() } as usize;
    if size < least || size > STRUCT_SIZE_MAX {
        return Err(Failure::new(AGS_INVALID, format!("{what} has struct_size {size}: begin with its _INIT")));
    }
    let known = size_of::<T>();
    if size == known {
        // SAFETY: readable for as many bytes, which are a T, by the contract above.
        return Ok(unsafe { pointer.read_unaligned() });
    }
    for at in known..size {
        // SAFETY: below the size that the caller says the struct has.
        let place = unsafe { pointer.cast::<u8>().add(at) };
        // SAFETY: readable, as above.
        if unsafe { place.read() } != 0 {
            return Err(Failure::new(
                AGS_VERSION,
                format!("{what} asks for something that this library is too old for"),
            ));
        }
    }
    // SAFETY: zero bytes are a T, by the contract above.
    let mut copy: T = unsafe { std::mem::zeroed() };
    // SAFETY: both are at least this long, and the copy is private.
    unsafe { std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), (&raw mut copy).cast::<u8>(), size.min(known)) };
    Ok(copy)
}
