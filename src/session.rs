//! The way from the options to a running replicator and one of its services.

use crate::cli::{Place, Service, StateDir};
use crate::failure::{FAILED, Failure};
use holdfast_replicator::config::{Config, DEFAULT_PATH};
use holdfast_replicator::control::client::Client;
use holdfast_replicator::control::find_socket;
use holdfast_replicator::control::membership::Own;
use holdfast_replicator::control::protocol::{NodeStatus, ServiceCommand, ServiceReport};
use std::net::SocketAddr;
use std::path::Path;

/// A connection, and the service a command is about.
pub struct Session {
    pub client: Client,
    pub service: String,
}

impl Place {
    /// The configuration these options name.
    pub fn configuration(&self) -> Result<Config, Failure> {
        let file = self.config.as_deref().unwrap_or(Path::new(DEFAULT_PATH));
        Config::load(file).map_err(|error| Failure::from_error(&error))
    }

    /// Where this node keeps its identity, and what peers are told of it.
    pub fn own(&self, state: &StateDir, link_addresses: &[SocketAddr]) -> Result<Own, Failure> {
        let directory = state.state_dir.as_deref();
        Own::find(self.config.as_deref(), directory, link_addresses)
            .map_err(|error| Failure::from_error(&error))
    }

    /// Connects to the replicator these options name.
    pub fn connect(&self) -> Result<Client, Failure> {
        let path = find_socket(self.socket.as_deref(), self.config.as_deref())
            .map_err(|error| Failure::from_error(&error))?;
        Ok(Client::connect(&path)?)
    }

    /// Connects, and settles which service is meant.
    pub fn session(&self, service: &Service) -> Result<Session, Failure> {
        let mut client = self.connect()?;
        let service = match &service.service {
            Some(name) => name.clone(),
            None => only_service(&client.status()?)?,
        };
        Ok(Session { client, service })
    }
}

/// The service that is meant where none is named.
fn only_service(node: &NodeStatus) -> Result<String, Failure> {
    match node.services.as_slice() {
        [service] => Ok(service.name.clone()),
        services => {
            let names: Vec<&str> = services
                .iter()
                .map(|service| service.name.as_str())
                .collect();
            Err(Failure::new(
                FAILED,
                format!(
                    "node {} has {} services; name the one you mean",
                    node.node,
                    services.len()
                ),
                "Nothing was changed",
                if names.is_empty() {
                    String::new()
                } else {
                    format!("It has: {}", names.join(", "))
                },
            ))
        }
    }
}

impl Session {
    /// Has the service carry out a command and prints its sentence.
    pub fn run(&mut self, command: ServiceCommand) -> Result<(), Failure> {
        let text = self.client.command(&self.service, command)?;
        say!("{text}");
        Ok(())
    }

    /// What discarding this copy's writes, or forcing it, would lose.
    pub fn loss(&mut self) -> Result<String, Failure> {
        Ok(self
            .client
            .command(&self.service, ServiceCommand::WhatWouldForceLose)?)
    }

    /// The service's status now.
    pub fn report(&mut self) -> Result<ServiceReport, Failure> {
        let status = self.client.status()?;
        let node = status.node;
        status
            .services
            .into_iter()
            .find(|service| service.name == self.service)
            .ok_or_else(|| {
                Failure::new(
                    FAILED,
                    format!("node {node} has no service {:?}", self.service),
                    "Nothing was changed",
                    "`holdfast status` lists the services",
                )
            })
    }
}
