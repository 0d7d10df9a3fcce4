//! The forms of single texts: names, topics, images, addresses, paths, times. Each `Err` completes "expected ...".

use crate::limits::{NAME_LENGTH_MAX, TOPIC_LENGTH_MAX};

/// What a check of form says.
pub(crate) type Form<T = ()> = Result<T, String>;

/// A DNS label, because names become parts of Kubernetes names.
pub(crate) fn name(text: &str) -> Form {
    if text.contains('.') {
        return Err("a name without '.', which is kept for outputs such as NAME.errors".to_owned());
    }
    let letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let good = text.len() <= NAME_LENGTH_MAX
        && text.starts_with(letter)
        && text.ends_with(letter)
        && text.chars().all(|c| letter(c) || c == '-');
    if good {
        return Ok(());
    }
    Err(format!(
        "a name of at most {NAME_LENGTH_MAX} lower-case letters a-z, digits and '-', that begins and ends with a letter or digit"
    ))
}

/// A Kafka topic, by Kafka's own rule.
pub(crate) fn topic(text: &str) -> Form {
    let good = text.len() <= TOPIC_LENGTH_MAX
        && text != "."
        && text != ".."
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
    if good {
        Ok(())
    } else {
        Err(format!("a topic's name: at most {TOPIC_LENGTH_MAX} letters a-z A-Z, digits, '.', '_' and '-'"))
    }
}

/// A consumer group: Kafka takes any text, we only what can be printed.
pub(crate) fn group(text: &str) -> Form {
    let good = text.len() <= TOPIC_LENGTH_MAX && !text.chars().any(|c| c.is_control() || c.is_whitespace());
    if good {
        Ok(())
    } else {
        Err(format!("a consumer group's name: at most {TOPIC_LENGTH_MAX} bytes, without white space"))
    }
}

/// `HOST:PORT`, several with commas between.
pub(crate) fn bootstrap_servers(text: &str) -> Form {
    let good = text.split(',').all(|server| {
        let Some((host, port)) = server.trim().rsplit_once(':') else { return false };
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host_is_good = match bare {
            Some(address) => {
                !address.is_empty() && address.chars().all(|c| c.is_ascii_hexdigit() || matches!(c, ':' | '.' | '%'))
            }
            None => !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')),
        };
        host_is_good && port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    if good {
        Ok(())
    } else {
        Err("HOST:PORT, or several with commas between, such as broker-1:9092,broker-2:9092".to_owned())
    }
}

/// A path to a file, by its form only.
pub(crate) fn path(text: &str) -> Form {
    let last = text.rsplit('/').next().unwrap_or(text);
    if matches!(last, "" | "." | "..") {
        return Err("the path of a file, not of a folder".to_owned());
    }
    if text.chars().any(char::is_control) {
        return Err("a path without control characters".to_owned());
    }
    Ok(())
}

/// An image reference: `[HOST[:PORT]/]NAME[:TAG][@DIGEST]`.
pub(crate) fn image(text: &str) -> Form {
    let form = || Err("an image's name, [HOST[:PORT]/]NAME[:TAG][@DIGEST], such as ghcr.io/me/combiner:1.2".to_owned());
    if text.contains(char::is_whitespace) {
        return Err(
            "an image's name without white space; what to start goes beside parDo, as command: [...]".to_owned()
        );
    }
    let (rest, digest) = text.split_once('@').map_or((text, None), |(rest, digest)| (rest, Some(digest)));
    let digest_is_good = digest.is_none_or(|digest| {
        digest.split_once(':').is_some_and(|(algorithm, value)| {
            !algorithm.is_empty()
                && algorithm.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '.' | '-' | '_'))
                && value.len() >= 32
                && value.chars().all(|c| c.is_ascii_hexdigit())
        })
    });
    let slash = rest.rfind('/').map_or(0, |slash| slash + 1);
    let (folder, last) = rest.split_at(slash);
    let (last, tag) = last.split_once(':').map_or((last, None), |(last, tag)| (last, Some(tag)));
    let tag_is_good = tag.is_none_or(|tag| {
        (1..=128).contains(&tag.len())
            && !tag.starts_with(['.', '-'])
            && tag.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
    });
    if !digest_is_good || !tag_is_good || text.len() > 512 {
        return form();
    }
    let mut components: Vec<&str> =
        folder.strip_suffix('/').unwrap_or_default().split('/').filter(|_| slash > 0).collect();
    components.push(last);
    let mut components = components.into_iter().peekable();
    if let Some(first) = components.next_if(|first| slash > 0 && (first.contains(['.', ':']) || *first == "localhost"))
    {
        let (host, port) = first.split_once(':').map_or((first, None), |(host, port)| (host, Some(port)));
        let host_is_good =
            !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-'));
        if !host_is_good || port.is_some_and(|port| port.parse::<u16>().is_err()) {
            return form();
        }
    }
    let mut upper = false;
    for component in components {
        let inside = component.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
        let edges = component.starts_with(|c: char| c.is_ascii_alphanumeric())
            && component.ends_with(|c: char| c.is_ascii_alphanumeric());
        if !inside || !edges {
            return form();
        }
        upper |= component.chars().any(|c| c.is_ascii_uppercase());
    }
    if upper { Err(format!("an image's name in lower case, such as {}", text.to_ascii_lowercase())) } else { Ok(()) }
}

/// The name of an environment variable, as Kubernetes takes it.
pub(crate) fn variable(text: &str) -> Form {
    if text.starts_with("AGS_") {
        return Err("another name: those that begin with AGS_ are set by the agent".to_owned());
    }
    let good = !text.starts_with(|c: char| c.is_ascii_digit())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'));
    if good {
        Ok(())
    } else {
        Err("a variable's name: letters a-z A-Z, digits, '_', '-' and '.', not beginning with a digit".to_owned())
    }
}

/// The name of a librdkafka property.
pub(crate) fn property(text: &str) -> Form {
    let good = !text.is_empty()
        && text.len() <= 128
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_' | '-'));
    if good {
        Ok(())
    } else {
        Err("a librdkafka property: lower-case letters a-z, digits, '.', '_' and '-', such as fetch.min.bytes"
            .to_owned())
    }
}

/// Milliseconds since 1970 of an RFC 3339 time, such as `2024-05-01T12:00:00Z` or `2024-05-01T12:00:00.5+02:00`.
pub(crate) fn time(text: &str) -> Option<i64> {
    let bytes = text.as_bytes();
    let number = |from: usize, to: usize| {
        let digits = text.get(from..to)?;
        digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse::<i64>().ok())?
    };
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    let separators =
        [(4, "-"), (7, "-"), (13, ":"), (16, ":")].iter().all(|(at, mark)| text.get(*at..at + 1) == Some(mark));
    if !separators || !matches!(bytes.get(10), Some(b'T' | b't' | b' ')) {
        return None;
    }
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let days_in_month = match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    // 60 is a leap second; Unix time has none, so it is the next second.
    if !(1..=days_in_month).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let mut rest = text.get(19..)?;
    let mut millis = 0;
    if let Some(fraction) = rest.strip_prefix('.') {
        let digits = fraction.bytes().take_while(u8::is_ascii_digit).count();
        let (fraction, after) = fraction.split_at_checked(digits).filter(|_| (1..=9).contains(&digits))?;
        millis = format!("{fraction:0<3}").get(..3)?.parse().ok()?;
        rest = after;
    }
    let offset_minutes = match rest {
        "Z" | "z" => 0,
        _ => {
            let sign = if rest.starts_with('+') { 1 } else { -1 };
            let (hours, minutes) = rest.strip_prefix(['+', '-'])?.split_once(':')?;
            let two = |digits: &str| {
                (digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse::<i64>().ok())?
            };
            let (hours, minutes) = (two(hours)?, two(minutes)?);
            if hours > 23 || minutes > 59 {
                return None;
            }
            sign * (hours * 60 + minutes)
        }
    };
    // Days from 1970-01-01 to the first of March's year, by counting years from March so that the leap day comes last.
    let march_year = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = 365 * march_year + march_year.div_euclid(4) - march_year.div_euclid(100)
        + march_year.div_euclid(400)
        + day_of_year
        - 719_468;
    Some((days * 86_400 + hour * 3_600 + (minute - offset_minutes) * 60 + second) * 1_000 + millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        for (text, expected) in [
            ("1970-01-01T00:00:00Z", Some(0)),
            ("2024-02-29T12:34:56.789Z", Some(1_709_210_096_789)),
            ("2024-02-29t12:34:56z", Some(1_709_210_096_000)),
            ("2024-03-01 00:00:00+02:00", Some(1_709_244_000_000)),
            ("1999-12-31T23:59:59.5-00:30", Some(946_686_599_500)),
            ("2000-01-01T00:00:00.123456789Z", Some(946_684_800_123)),
            ("1969-12-31T23:59:59Z", Some(-1_000)),
            ("9999-12-31T23:59:59Z", Some(253_402_300_799_000)),
            ("2023-02-29T00:00:00Z", None),
            ("2024-13-01T00:00:00Z", None),
            ("2024-01-01T24:00:00Z", None),
            ("2024-01-01T00:00:00", None),
            ("2024-01-01", None),
            ("2024-01-01T00:00:00.Z", None),
            ("2024-01-01T00:00:00+0200", None),
            ("yesterday", None),
            ("+024-01-01T00:00:00Z", None),
            ("é024-01-01T00:00:00Z", None),
        ] {
            assert_eq!(time(text), expected, "{text}");
        }
    }

    #[test]
    fn images() {
        for text in [
            "img",
            "some-combiner-image",
            "ghcr.io/me/combiner:1.2",
            "localhost:5000/a/b__c",
            "library/python:3.12-slim",
            "img@sha256:0123456789abcdef0123456789abcdef",
            "Host.Example/me/img",
        ] {
            assert_eq!(image(text), Ok(()), "{text}");
        }
        for text in [
            "",
            "/img",
            "img/",
            "a//b",
            "img:",
            "img:-x",
            "Img",
            "-img",
            "img@sha256:12",
            "a b",
            "host.io:99999/x",
            "img:a:b",
            "ïmg",
            "a/b.c:1/d?",
        ] {
            assert!(image(text).is_err(), "{text}");
        }
    }

    #[test]
    fn servers() {
        for text in ["localhost:9092", "a:1,b:2", "a:1, b:2", "[::1]:9092", "10.0.0.1:9092"] {
            assert_eq!(bootstrap_servers(text), Ok(()), "{text}");
        }
        for text in ["localhost", "a:0", "a:70000", ":9092", "a:1,", "http://a:1", "a:+1", "::1:9092"] {
            assert!(bootstrap_servers(text).is_err(), "{text}");
        }
    }
}
