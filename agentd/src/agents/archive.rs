//! Which bytes are in a package that may be compressed?
//!
//! In:    a tar, or a tar as one Zstandard frame, by its first four bytes. Out: the tar.
//! Always: no more comes out than a package may hold with its headers, however little goes in; the decoder's window is
//!         bounded before memory is taken for it.
//! Source: RFC 8878, 3.1.1 (frames) and 3.1.1.1.2 (windows).

use super::package::PACKAGE_MOST_BYTES;
use ruzstd::decoding::StreamingDecoder;
use std::io::{self, BufRead, Read};

/// Header, padding and a long name of each of the most files that a package may hold.
const HEADERS_MOST_BYTES: u64 = 64 * 1024 * 1024;
/// What `zstd -19` needs. Its `--ultra` levels and `--long` need more, and agentd has to hold it.
const WINDOW_MOST_BYTES: u64 = 8 * 1024 * 1024;
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// A reader of the tar. Its end by the bound is an error of kind `FileTooLarge`.
pub fn open<'a>(file: impl BufRead + 'a) -> io::Result<impl Read + 'a> {
    open_within(file, PACKAGE_MOST_BYTES + HEADERS_MOST_BYTES)
}

fn open_within<'a>(mut file: impl BufRead + 'a, most_bytes: u64) -> io::Result<impl Read + 'a> {
    let compressed = file.fill_buf()?.starts_with(&ZSTD_MAGIC);
    let tar: Box<dyn Read + 'a> = if compressed {
        let decoder = StreamingDecoder::new_with_max_window_size(file, WINDOW_MOST_BYTES);
        Box::new(decoder.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?)
    } else {
        Box::new(file)
    };
    Ok(Bounded { tar, left: most_bytes })
}

struct Bounded<R> {
    tar: R,
    left: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.tar.read(buffer)?;
        self.left = self.left.checked_sub(count as u64).ok_or(io::ErrorKind::FileTooLarge)?;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::super::package::{manifest_of_tar, unpack};
    use super::*;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    fn zeros(bytes: u64) -> impl Read {
        io::repeat(0).take(bytes)
    }

    fn tar_with(name: &str, content: impl Read, bytes: u64) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, content, bytes) in [
            (name, Box::new(content) as Box<dyn Read>, bytes),
            ("agent.toml", Box::new(&b"[agent]"[..]) as Box<dyn Read>, 7),
        ] {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, content).expect("appended");
        }
        builder.into_inner().expect("a tar")
    }

    #[test]
    fn a_compressed_package_is_the_same_package() {
        let top = tempfile::tempdir().expect("a folder");
        let tar = tar_with("data", zeros(100_000), 100_000);
        let small = compress_to_vec(tar.as_slice(), CompressionLevel::Fastest);
        assert!(small.len() < 10_000, "{}", small.len());
        assert_eq!(manifest_of_tar(small.as_slice()).expect("there"), "[agent]");
        let plain = unpack(tar.as_slice(), &top.path().join("plain")).expect("unpacked");
        let unpacked = unpack(small.as_slice(), &top.path().join("small")).expect("unpacked");
        assert_eq!(plain.digest, unpacked.digest);
    }

    #[test]
    fn a_decompression_bomb_is_cut_off() {
        let mut bomb = Vec::new();
        ruzstd::encoding::compress(zeros(64 << 20), &mut bomb, CompressionLevel::Fastest);
        assert!(bomb.len() < 64 << 10, "{}", bomb.len());
        let mut taken = Vec::new();
        let mut tar = open_within(bomb.as_slice(), 1 << 20).expect("a frame");
        let error = tar.read_to_end(&mut taken).expect_err("cut off");
        assert_eq!((error.kind(), taken.len()), (io::ErrorKind::FileTooLarge, 1 << 20));
        // The same through the reader of tars, which skips what is before the manifest.
        let tar = tar_with("data", zeros(4 << 20), 4 << 20);
        let mut bomb = Vec::new();
        ruzstd::encoding::compress(tar.as_slice(), &mut bomb, CompressionLevel::Fastest);
        let mut archive = tar::Archive::new(open_within(bomb.as_slice(), 1 << 20).expect("a frame"));
        let errors: Vec<_> = archive.entries().expect("entries").filter_map(Result::err).collect();
        assert!(errors.iter().any(|error| error.kind() == io::ErrorKind::FileTooLarge), "{errors:?}");
    }

    #[test]
    fn a_broken_or_greedy_frame_is_an_error() {
        let small =
            compress_to_vec(tar_with("data", zeros(5_000), 5_000).as_slice(), CompressionLevel::Fastest);
        for cut in [4, 5, 20, small.len() - 1] {
            assert!(manifest_of_tar(&small[..cut]).is_err(), "cut at {cut}");
        }
        // A frame header that asks for a window of 2 GiB (exponent 21): no memory is taken for it.
        let greedy = [&ZSTD_MAGIC[..], &[0x00, 21 << 3, 0x01, 0x00, 0x00]].concat();
        let error = manifest_of_tar(greedy.as_slice()).expect_err("refused");
        assert!(error.to_string().contains("window"), "{error}");
    }
}
