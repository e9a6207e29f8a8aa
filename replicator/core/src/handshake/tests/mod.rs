//! Tests of the handshake: each row, the properties of the function, promotion, and the enumeration.

mod build;
mod enumerate;
mod model;
mod outline;
mod promotion;
mod properties;
mod table;
