//! Puts items between what is around them, as far as there is room. Never here: what items are.

use super::{Carrier, Request};

/// How many items a batch has at most, whatever its provider takes.
pub(super) const ITEMS_MAX: usize = 10_000;

/// The items between what is around them, as many as have room.
#[derive(Debug)]
pub(super) struct Packing {
    carrier: Carrier,
    body: String,
    count: usize,
    items_max: usize,
    bytes_max: usize,
}

impl Packing {
    pub(super) fn new(carrier: Carrier, items_max: usize, bytes_max: usize) -> Self {
        let items_max = items_max.min(ITEMS_MAX);
        Self { body: carrier.opening.clone(), carrier, count: 0, items_max, bytes_max }
    }

    /// Whether it had room.
    pub(super) fn add(&mut self, item: &str) -> bool {
        let between = if self.count == 0 { "" } else { self.carrier.between };
        let bytes = self.body.len() + between.len() + item.len() + self.carrier.closing.len();
        if self.count >= self.items_max || bytes > self.bytes_max {
            return false;
        }
        self.body.push_str(between);
        self.body.push_str(item);
        self.count += 1;
        true
    }

    pub(super) fn finish(mut self) -> Request {
        self.body.push_str(&self.carrier.closing);
        Request { content_type: self.carrier.content_type, ..Request::post(self.carrier.path, self.body) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_room_in_a_batch_is_left_for_another() {
        let check = |items_max, bytes_max, body: &str, room: [bool; 3]| {
            let carrier = Carrier {
                path: String::new(),
                content_type: String::new(),
                opening: "<".to_owned(),
                between: ",",
                closing: ">".to_owned(),
            };
            let mut packing = Packing::new(carrier, items_max, bytes_max);
            assert_eq!(["aa", "bb", "c"].map(|item| packing.add(item)), room);
            assert_eq!(packing.finish().body, body);
            assert!(body.len() <= bytes_max.max(2));
        };
        check(9, 9, "<aa,bb,c>", [true, true, true]);
        check(9, 8, "<aa,bb>", [true, true, false]);
        check(9, 6, "<aa,c>", [true, false, true]);
        check(2, 9, "<aa,bb>", [true, true, false]);
        check(9, 1, "<>", [false, false, false]);
    }
}
