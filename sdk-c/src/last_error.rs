//! The sentence about what went wrong last on this thread.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};

thread_local! {
    static LAST: RefCell<CString> = RefCell::new(CString::default());
}

/// Leaves a sentence for `ags_last_error`.
pub(crate) fn set(sentence: &str) {
    // A zero byte inside would end the sentence for C: it is left out.
    let bytes: Vec<u8> = sentence.bytes().filter(|byte| *byte != 0).collect();
    let sentence = CString::new(bytes).unwrap_or_default();
    // A thread that is ending has no place for sentences any more, and nobody who would ask.
    let _ending = LAST.try_with(|last| last.replace(sentence));
}

/// The sentence, valid until the next one on this thread.
pub(crate) fn pointer() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(CStr::as_ptr(c""))
}
