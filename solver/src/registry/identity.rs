//! Identity tokens: what a login gives in place of a password (OAuth2, distribution's token specification).

use super::auth::{Challenge, Credentials, parse_challenge};
use super::client::{Client, RemoteImage};
use reqwest::{Method, Url, header};

impl Client {
    /// Asks the token server of a registry for an identity token. `None` when there is no token server or it gives none.
    pub fn identity_token(&self, host: &str, credentials: &Credentials) -> Option<String> {
        #[derive(serde::Deserialize)]
        struct Answer {
            refresh_token: Option<String>,
        }
        let nobody = RemoteImage { host: host.to_owned(), repository: String::new(), tag: None, digest: None };
        let url = self.registry_url(host, "").ok()?;
        let exchange = self.login_exchange(Method::GET, &nobody, url.clone());
        let response = self.ask_once(&exchange, &url, self.http_client(&url).ok()?.get(url.clone())).ok()?;
        let values = response.headers().get_all(header::WWW_AUTHENTICATE);
        let challenge = parse_challenge(values.iter().filter_map(|value| value.to_str().ok()));
        let Some(Challenge::Bearer { realm, service, .. }) = challenge else { return None };
        let realm = Url::parse(&realm).ok()?;
        // A registry reached safely must not send passwords elsewhere in the clear.
        if realm.scheme() != "https" && url.scheme() == "https" {
            return None;
        }
        let mut form = Url::parse("http://form/").ok()?;
        form.query_pairs_mut()
            .append_pair("grant_type", "password")
            .append_pair("access_type", "offline")
            .append_pair("client_id", "nacre")
            .append_pair("service", service.as_deref().unwrap_or_default())
            .append_pair("username", &credentials.user)
            .append_pair("password", &credentials.password);
        let request = self
            .http_client(&realm)
            .ok()?
            .post(realm.clone())
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(form.query().unwrap_or_default().to_owned());
        let response =
            self.ask_once(&exchange, &realm, request).ok().filter(|response| response.status().is_success())?;
        let answer: Answer = serde_json::from_slice(&self.small_body(response)?).ok()?;
        answer.refresh_token.filter(|token| !token.is_empty())
    }
}
