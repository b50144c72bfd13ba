//! libdeflate's decompressor for gzip that tells how many bytes it took, which `libdeflater` does not pass on.

use libdeflate_sys::{
    libdeflate_alloc_decompressor, libdeflate_decompressor, libdeflate_free_decompressor,
    libdeflate_gzip_decompress_ex, libdeflate_result_LIBDEFLATE_SUCCESS,
};
use std::ptr::NonNull;

/// A decompressor with its memory.
#[derive(Debug)]
pub struct Gunzip(NonNull<libdeflate_decompressor>);

// SAFETY: it is memory that nobody else knows of, and nothing in it belongs to a thread.
unsafe impl Send for Gunzip {}

impl Gunzip {
    /// `None` when there is no memory.
    pub fn new() -> Option<Self> {
        // SAFETY: has no conditions.
        NonNull::new(unsafe { libdeflate_alloc_decompressor() }).map(Self)
    }

    /// Decompresses the gzip member that `input` begins with, and checks it. How many bytes were taken and how many made;
    /// `None` when it is damaged, cut, or larger than `output`.
    pub fn member(&mut self, input: &[u8], output: &mut [u8]) -> Option<(usize, usize)> {
        let (mut taken, mut made) = (0, 0);
        // SAFETY: the decompressor is ours, both buffers are as long as is said, and the numbers are written before the return.
        let result = unsafe {
            libdeflate_gzip_decompress_ex(
                self.0.as_ptr(),
                input.as_ptr().cast(),
                input.len(),
                output.as_mut_ptr().cast(),
                output.len(),
                &raw mut taken,
                &raw mut made,
            )
        };
        (result == libdeflate_result_LIBDEFLATE_SUCCESS).then_some((taken, made))
    }
}

impl Drop for Gunzip {
    fn drop(&mut self) {
        // SAFETY: it was allocated by `new`, and is not used any more.
        unsafe { libdeflate_free_decompressor(self.0.as_ptr()) };
    }
}
