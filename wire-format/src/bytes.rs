//! Cursors over fixed little-endian layouts. Every read is bounds-checked and nothing here allocates except
//! what [`Reader::text`] returns, which is at most its stated cap.

/// What was wrong with the bytes, in words for an error message.
pub(crate) type Fault = &'static str;

/// Takes values from the front of a slice.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Reader { rest: bytes }
    }

    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    pub fn take(&mut self, count: usize) -> Result<&'a [u8], Fault> {
        let (head, tail) = self
            .rest
            .split_at_checked(count)
            .ok_or("it ends too early")?;
        self.rest = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let (head, tail) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or("it ends too early")?;
        self.rest = tail;
        Ok(*head)
    }

    pub fn u8(&mut self) -> Result<u8, Fault> {
        Ok(self.array::<1>()?[0])
    }
    pub fn u16(&mut self) -> Result<u16, Fault> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    pub fn u32(&mut self) -> Result<u32, Fault> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    pub fn u64(&mut self) -> Result<u64, Fault> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    pub fn u128(&mut self) -> Result<u128, Fault> {
        Ok(u128::from_le_bytes(self.array()?))
    }

    /// A byte of which only the bits in `known` may be set.
    pub fn flags(&mut self, known: u8) -> Result<u8, Fault> {
        let bits = self.u8()?;
        if bits & !known != 0 {
            return Err("an unknown flag is set");
        }
        Ok(bits)
    }

    /// Reserved bytes: zero, so that a later version can give them a meaning.
    pub fn zero(&mut self, count: usize) -> Result<(), Fault> {
        if self.take(count)?.iter().any(|b| *b != 0) {
            return Err("reserved bytes are not zero");
        }
        Ok(())
    }

    /// UTF-8 of `length` bytes, refused above `cap`.
    pub fn text(&mut self, length: usize, cap: usize) -> Result<String, Fault> {
        if length > cap {
            return Err("a text is longer than allowed");
        }
        let bytes = self.take(length)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err("a text is not UTF-8"),
        }
    }

    /// Nothing may follow.
    pub fn end(&self) -> Result<(), Fault> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err("it is longer than its content")
        }
    }
}

/// Appends values to a vector.
pub(crate) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    pub fn with_capacity(capacity: usize) -> Self {
        Writer {
            bytes: Vec::with_capacity(capacity),
        }
    }
    pub fn len(&self) -> usize {
        self.bytes.len()
    }
    pub fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }
    pub fn u16(&mut self, value: u16) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }
    pub fn u32(&mut self, value: u32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }
    pub fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }
    pub fn u128(&mut self, value: u128) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }
    pub fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }
    pub fn zero(&mut self, count: usize) {
        self.bytes.resize(self.bytes.len() + count, 0);
    }
    pub fn into_vec(self) -> Vec<u8> {
        self.bytes
    }
}

/// The longest prefix of `text` of at most `cap` bytes that ends at a character.
pub(crate) fn shorten(text: &str, cap: usize) -> &str {
    let mut end = text.len().min(cap);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Packs booleans into a byte, first one lowest.
pub(crate) fn pack<const N: usize>(flags: [bool; N]) -> u8 {
    const { assert!(N <= 8) };
    flags
        .iter()
        .enumerate()
        .fold(0, |bits, (at, set)| bits | u8::from(*set) << at)
}

/// The inverse of [`pack`].
pub(crate) fn unpack<const N: usize>(bits: u8) -> [bool; N] {
    const { assert!(N <= 8) };
    std::array::from_fn(|at| bits & 1 << at != 0)
}
